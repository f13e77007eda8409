"""Rows → one line a method and data set, as JSON, CSV and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.counts import COUNTS, TOLD_APART, TOLD_APART_OF, Count, count, count_told_apart, told_apart_counts
from propmeta_edit.evaluation.measures import MEASURES
from propmeta_edit.evaluation.rows import SETTINGS, Row, select_rows
from propmeta_edit.evaluation.runner import MethodSpec
from propmeta_edit.evaluation.statistics import wilson_interval
from propmeta_edit.files import sha256_of_json, write_json_atomically, write_text_atomically

SETTINGS_FILE = "settings.json"
ACCURACY = Count("accuracy", "accuracy %", lambda row: [float(row.correct)])
FEW = 30  # fewer cases than this are flagged
LOW_EFFICACY = 0.5  # rows that write fewer of their facts are flagged: what they score does not come from the edits


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry a (method, data set), in the order of first appearance; accuracies are shares in 0 to 1.

    Rows that are groups of facts are no entries of their own: what they tell stands with their data set.

    Raises:
        DataError: rows of one method and data set made with different settings, or a data set scored by different protocols or
            read from different files.
    """
    _require_one_source(rows)
    groups = [row for row in rows if TOLD_APART in row.tags]
    single = [row for row in rows if TOLD_APART not in row.tags]
    sizes = sorted({int(row.tags[TOLD_APART]) for row in groups})
    pairs = list(dict.fromkeys((row.method, row.dataset) for row in single))
    summary = [_summarise_pair(select_rows(single, method, dataset)) for method, dataset in pairs]
    for entry in summary:
        own = [r for r in groups if (r.method, r.tags[TOLD_APART_OF]) == (entry["method"], entry["dataset"])]
        for k in sizes:
            entry.update(count_told_apart(own, k))
    return summary


def _require_one_source(rows: Sequence[Row]) -> None:
    for dataset in dict.fromkeys(row.dataset for row in rows):
        protocols = {row.protocol for row in rows if row.dataset == dataset}
        if len(protocols) > 1:
            raise DataError(f"{dataset} was scored by different protocols ({', '.join(sorted(protocols))}); tabulate them apart")
        if len({row.data_sha256 for row in rows if row.dataset == dataset}) > 1:
            raise DataError(
                f"the rows of {dataset} come from different files of that name; tabulate them apart, with another --output"
            )


def require_comparable(rows: Sequence[Row]) -> None:
    """Refuse to set beside one another what started from different models, drew its cases with different seeds, or asked the cases
    of different files under one name.

    Raises:
        DataError: naming the methods, or the data set, on either side.
    """
    _require_one_source(rows)
    for name, what in (("base_sha256", "started from different base models"), ("seed", "were run with different seeds")):
        methods: dict[object, str] = {}
        for row in rows:
            methods.setdefault(getattr(row, name), row.method)
        if len(methods) > 1:
            sides = " and ".join(f"{method} ({str(value)[:12]})" for value, method in methods.items())
            raise DataError(f"the rows of {sides} {what}; tabulate them apart, with another --output")


def _summarise_pair(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    if len({row.settings for row in rows}) > 1:
        raise DataError(f"rows of {first.method} on {first.dataset} differ in one of {', '.join(SETTINGS)}; tabulate them apart")
    seconds = [row.seconds_per_edit for row in rows if row.seconds_per_edit is not None]
    return {
        "method": first.method,
        "dataset": first.dataset,
        "model": first.model,
        "n": len(rows),
        **_measure(rows),
        **count(rows, COUNTS),
        "accuracy_n": len(rows),
        "accuracy_ci95_groups": count(rows, [ACCURACY])["accuracy_ci95"],
        "seconds_per_edit": fmean(seconds) if seconds else None,
        "n_timed": len(seconds),
        "seconds_per_edit_median": median(seconds) if seconds else None,
        **_throughput(rows),
        "errors": sum(row.error is not None for row in rows),
        "notes": list(dict.fromkeys(row.note for row in rows if row.note)),
        "precomputation": dict(first.precomputation),
        **{name: getattr(first, name) for name in SETTINGS},
        "device": first.device,
        "dtype": first.dtype,
        "versions": dict(first.versions),
    }


def _measure(rows: Sequence[Row]) -> dict[str, Any]:
    """Every measure's share of the cases that were asked, None where none was, and the intervals."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        verdicts = [value for row in rows if (value := getattr(row, measure.field)) is not None]
        found[measure.column] = fmean(verdicts) if verdicts else None
        if measure.has_interval:
            interval = list(wilson_interval(sum(verdicts), len(verdicts))) if verdicts else None
            found[f"{measure.column}_ci95"] = interval
    return found


def _throughput(rows: Sequence[Row]) -> dict[str, Any]:
    """Cases a second, edits and questions, of those that were run side by side, and how many were."""
    together = [row for row in rows if (row.cases_at_once or 1) > 1 and row.seconds]
    seconds = sum(row.seconds or 0.0 for row in together)
    return {
        "cases_per_second": len(together) / seconds if seconds else None,
        "cases_at_once": max((row.cases_at_once or 1 for row in together), default=1),
    }


def write_tables(summary: Sequence[dict[str, Any]], folder: str | Path, notes: Sequence[str] = ()) -> str:
    """Write ``table.json``, ``table.csv`` and ``table.md``, each whole or not at all.

    Returns:
        The Markdown text.
    """
    folder = Path(folder)
    markdown = make_markdown(summary, notes)
    write_json_atomically(folder / "table.json", list(summary))
    write_text_atomically(folder / "table.csv", pd.json_normalize(list(summary)).to_csv(index=False))
    write_text_atomically(folder / "table.md", markdown)
    return markdown


def make_markdown(summary: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Two tables for reading: the cases' own shares, then what was counted over further questions and pairs of subjects.

    Percentages with 95 % intervals, few cases flagged, without the columns that no row fills.
    """
    legend = ["Brackets: 95 % intervals, Wilson's or, where n is said, by bootstrap over entity and relation.", *notes]
    legend += [f"{entry['method']} on {entry['dataset']}: {note}." for entry in summary for note in entry["notes"]]
    if any(entry["n"] < FEW for entry in summary):
        legend.append(f"†: fewer than {FEW} cases.")
    if any(_is_barely_written(entry) for entry in summary):
        legend.append(
            f"‡: fewer than {100 * LOW_EFFICACY:.0f} % of the facts are answered after they were written, so the other columns "
            "tell little of the method: raise its rate or its steps (propmeta-edit choose-rate finds a rate for FT and MetaFT)."
        )
    names = [{"method": entry["method"], "data set": entry["dataset"]} for entry in summary]
    table = _filled_columns([{**name, **_cells_of(entry)} for name, entry in zip(names, summary, strict=True)])
    counted = [{one.title: _count_cell(entry, one.column) for one in _counts_in(entry)} for entry in summary]
    if any(cell != "–" for cells in counted for cell in cells.values()):
        table += "\n" + _filled_columns([{**name, **cells} for name, cells in zip(names, counted, strict=True)])
    return table + "\n" + "\n".join(f"- {note}" for note in legend) + "\n"


def _filled_columns(rows: Sequence[Mapping[str, str]]) -> str:
    header = [title for title in (rows[0] if rows else ()) if any(row[title] != "–" for row in rows)]
    return markdown_table(header, [[row[title] for title in header] for row in rows])


def _cells_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table by the titles of its columns; a dash where there is nothing to say."""
    seconds = entry["seconds_per_edit"]
    rate = None if seconds is None else entry["cases_per_second"]  # of rows that edit
    measured = {m.title: _percent(entry[m.column], entry.get(f"{m.column}_ci95")) for m in MEASURES}
    if _is_barely_written(entry):
        measured["efficacy %"] += " ‡"
    return {
        "n": f"{entry['n']}{'†' if entry['n'] < FEW else ''}",
        **measured,
        "s / edit": "–" if seconds is None else f"{seconds:.2f}",
        "cases / s": "–" if rate is None else f"{rate:.2f} ({entry['cases_at_once']} at once)",
        "once before, s": ", ".join(f"{name} {spent:.0f}" for name, spent in entry["precomputation"].items()) or "–",
        "errors": str(entry["errors"]),
    }


def _is_barely_written(entry: Mapping[str, Any]) -> bool:
    """Whether a row that edits, which takes time, leaves most facts unanswered."""
    share = entry["efficacy"]
    return share is not None and entry["seconds_per_edit"] is not None and share < LOW_EFFICACY


def _counts_in(entry: Mapping[str, Any]) -> list[Count]:
    sizes = [int(column.removeprefix("told_apart_")) for column in entry if re.fullmatch(r"told_apart_\d+", column)]
    return [*COUNTS, *(one for k in sizes for one in told_apart_counts(k))]


def _count_cell(entry: Mapping[str, Any], column: str) -> str:
    share, n = entry[column], entry[f"{column}_n"]
    return "–" if share is None else f"{_percent(share, entry[f'{column}_ci95'])} (n {n})"


def _percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def write_settings(specs: Sequence[MethodSpec], folder: str | Path) -> None:
    """Write ``settings.json``: what each method's rows were made with, beside those of methods that are in the file already."""
    _add_to_settings({spec.name: (spec.hparams_sha256, spec.settings) for spec in specs}, folder)


def keep_settings(found: Mapping[str, Mapping[str, Any]], folder: str | Path) -> None:
    """The same for results that are no rows, by their names."""
    _add_to_settings({name: (sha256_of_json(settings), settings) for name, settings in found.items()}, folder)


def _add_to_settings(found: Mapping[str, tuple[str, Mapping[str, Any]]], folder: str | Path) -> None:
    known = read_settings(folder)
    known |= {name: {"hparams_sha256": sha256, "settings": dict(settings)} for name, (sha256, settings) in found.items()}
    write_json_atomically(Path(folder) / SETTINGS_FILE, known)


def read_settings(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What ``settings.json`` says of each method, ``hparams_sha256`` and ``settings``; nothing where there is no such file."""
    path = Path(folder) / SETTINGS_FILE
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown, its last line ended; cells are taken as they are."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def frame_to_markdown(frame: pd.DataFrame, number: str = ".1f") -> str:
    """A frame as Markdown: floats in the format ``number``, what is missing as a dash."""
    rows = frame.itertuples(index=False)
    return markdown_table([str(name) for name in frame.columns], [[_as_cell(value, number) for value in row] for row in rows])


def _as_cell(value: Any, number: str) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:{number}}" if isinstance(value, float) else str(value).replace("|", "/")
