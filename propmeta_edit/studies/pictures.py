"""Tables and pictures of meta-trained variants, readable at the width of a column and in grey."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.tables import FEW, markdown_table, summarise
from propmeta_edit.files import save_figure, write_json_atomically, write_text_atomically
from propmeta_edit.recipes.splits import TEST, VALIDATION, Split
from propmeta_edit.studies.engine import Results

LINES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1)))
MARKERS = ("o", "s", "D", "^", "v", "X", "P", "<", ">", "p", "h", "d")
SHADES = ("black", "0.55")
# A marker a series, and a line and a shade that no other has together: told apart in grey.
STYLES = [(LINES[number % len(LINES)], marker, SHADES[number // len(LINES)]) for number, marker in enumerate(MARKERS)]
PLANE_STYLES = [(marker, shade) for shade in ("0.15", "0.65", "white") for marker in ("o", "s", "^", "D")]  # no two alike, in grey
PANEL_WIDTH = 3.3  # inches: a column of a paper
LETTERS_AN_INCH = 14  # of a title at nine points, at most
MOST_TICKS = 7
TOLD = "told_apart_"  # and a number of facts: the columns
APART = 0.02  # of the x axis between two series at the same place
ON_TEST = "the best (filled) on test"


def make_table(results: Results) -> pd.DataFrame:
    """A line a variant and data set in the variants' order, with its coordinates, interval and split.

    The best variants are marked ``chosen``, and those that were asked on the test split too have a line of what they reached there,
    ``reported``; ``panel`` is the data set they were chosen on.
    """
    study = results.study
    coordinates = {variant.name: dict(variant.coordinates) for variant in study.variants}
    lines = [line for split in study.splits for line in _lines_of(results.rows, split, split.data.name)]
    order = {name: place for place, name in enumerate(coordinates)}
    lines.sort(key=lambda line: order[line["method"]])
    for line in lines:
        line["chosen"] = (line["method"], line["dataset"]) in results.best
        is_papers_way = line["kind"] == TEST and study.series is not None
        line["split"] = f"{TEST} (chosen on test, as in the paper)" if is_papers_way else line["kind"]
    for name, data in results.best:
        if data in study.reported:
            own = [row for row in results.rows if row.method == name]
            told = {"chosen": True, "reported": True, "split": f"{TEST} (chosen on {VALIDATION})"}
            lines += [{**line, **told} for line in _lines_of(own, study.reported[data], data)]
    return pd.DataFrame({**line, **coordinates[line["method"]]} for line in lines)


def _lines_of(rows: Sequence[Row], split: Split, panel: str) -> list[dict[str, Any]]:
    """A line a variant that was asked a split; ``panel`` is where a picture shows it."""
    lines = []
    for entry in summarise([row for row in rows if row.dataset == split.data.name]):
        low, high = entry["accuracy_ci95"]
        about = {"panel": panel, "kind": split.kind, "is_released": split.is_released, "reported": False}
        lines.append({**entry, "entry": entry, "low": low, "high": high, **about})
    return lines


def write_summary(table: pd.DataFrame, path: Path) -> None:
    """A marked table as ``<path>.json`` and ``<path>.csv``."""
    extra = table[["split", "chosen"]].to_dict("records")
    entries = [{**entry, **more} for entry, more in zip(table["entry"], extra, strict=True)]
    write_json_atomically(path.with_suffix(".json"), entries)
    left_out = ["accuracy_ci95", "efficacy_ci95", "entry", "reported", "panel", "kind", "is_released"]  # for programs
    write_text_atomically(path.with_suffix(".csv"), table.drop(columns=left_out).to_csv(index=False))


def to_markdown(table: pd.DataFrame, columns: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The columns, accuracy with its interval, cases that failed where any did, and which were the best where anything was chosen.

    Few cases are flagged, and notes follow, as in the table of run_table2.py.
    """
    is_told = {"errors": bool(table["errors"].any()), "chosen": bool(table["chosen"].any())}
    extra = [name for name, is_one in is_told.items() if is_one]
    rows = []
    for row in table.assign(chosen=table["chosen"].map({True: "best", False: ""})).to_dict("records"):
        n = f"{row['n']}{'†' if row['n'] < FEW else ''}"
        shown = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        cells = [*(str(row[name]) for name in columns), n, shown, f"{100 * row['efficacy']:.1f}"]
        rows.append([*cells, *(str(row[name]) for name in extra)])
    legend = ["errors: cases that failed; they count as wrong until --retry-failed asks them again."] if is_told["errors"] else []
    legend += [f"†: fewer than {FEW} cases."] if (table["n"] < FEW).any() else []
    lines = "".join(f"- {note}\n" for note in [*legend, *notes])
    return markdown_table([*columns, "n", "accuracy % [95 %]", "efficacy %", *extra], rows) + (f"\n{lines}" if lines else "")


def write_figure(results: Results, x: str, line: str, title: str, xlabel: str, columns: Sequence[str]) -> str:
    """Accuracy against the coordinate ``x``, as a picture (PNG and SVG), a table and a summary; the table's text.

    Args:
        line: the coordinate each of whose values is a line of the picture.
        columns: of the table, besides data set and split.
    """
    table, path = make_table(results), results.folder / results.study.name
    write_summary(table, results.folder / f"summary-{results.study.name}")
    text = to_markdown(table, [*columns, "dataset", "split"], results.notes)
    write_text_atomically(path.with_suffix(".md"), text)
    save(draw_lines(table, x, line, title, xlabel), path)
    return text


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG."""
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_suffix(suffix))


def require_styles(names: Sequence[str]) -> None:
    """Refuse more series than a reader can tell apart.

    Raises:
        ConfigError: naming how many there are.
    """
    if len(names) > len(STYLES):
        raise ConfigError(
            f"a picture has at most {len(STYLES)} lines that are told apart in grey, got {len(names)}: {', '.join(names)}; "
            "sweep some of the models or modules into another --output"
        )


def draw_lines(table: pd.DataFrame, x: str, series: str, title: str, xlabel: str) -> Figure:
    """Accuracy against ``x``, a line a value of ``series``, a panel a data set, with 95 % intervals.

    The best variant of a series is filled, and a star at its place is what it reached on the test split. There is a style for each
    series that ``require_styles`` lets through.
    """
    panels = list(dict.fromkeys(table["panel"]))
    names = list(dict.fromkeys(table[series]))
    figure = Figure(figsize=(PANEL_WIDTH * len(panels), 3.2 + 0.15 * len(names)), layout="constrained")
    step = APART * ((table[x].max() - table[x].min()) or 1)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            own = table[(table["panel"] == panel) & (table[series] == name)]
            _draw_series(axis, own.assign(x=own[x] + step * (number - (len(names) - 1) / 2)), name, *STYLES[number])
        axis.set(xlabel=xlabel, ylim=(0, 100), title=panel)
        asked = sorted(table[x].unique())
        are_few = pd.api.types.is_integer_dtype(table[x]) and len(asked) <= MOST_TICKS
        axis.xaxis.set_major_locator(FixedLocator(asked) if are_few else MaxNLocator(MOST_TICKS))
    figure.axes[0].set_ylabel("accuracy after an edit, %")
    _finish(figure, f"{title}: {_describe_splits(table)}")
    return figure


def _draw_series(axis: Any, own: pd.DataFrame, name: str, line: Any, marker: str, shade: str) -> None:
    asked, test, best = own[~own["reported"]], own[own["reported"]], own[own["chosen"] & ~own["reported"]]
    _draw_dots(axis, asked, fmt=marker, color=shade, linestyle=line, markersize=4, linewidth=1, label=name)
    axis.plot(best["x"], 100 * best["accuracy"], marker, color=shade, markersize=6, zorder=3)
    if len(test):
        _draw_dots(axis, test, fmt="*", color=shade, markersize=9, label=ON_TEST)


def _draw_dots(axis: Any, rows: pd.DataFrame, **style: Any) -> None:
    low, high = (rows["accuracy"] - rows["low"]).clip(0), (rows["high"] - rows["accuracy"]).clip(0)
    errors = [100 * low, 100 * high]
    axis.errorbar(rows["x"], 100 * rows["accuracy"], yerr=errors, markerfacecolor="white", capsize=2, **style)


def draw_dots(table: pd.DataFrame, group: str, is_filled: str, labels: tuple[str, str], published: str, title: str) -> Figure:
    """Accuracy with its 95 % interval, a line a value of ``group`` and a panel a data set.

    Args:
        is_filled: the column that tells filled dots, ``labels[0]``, from open ones a little below, ``labels[1]``.
        published: the column of published percentages, crosses beside the dots; missing ones are left out.
    """
    panels, names = list(dict.fromkeys(table["panel"])), list(dict.fromkeys(table[group]))
    figure = Figure(figsize=(PANEL_WIDTH * max(1.3, len(panels)), 1.5 + 0.5 * len(names)), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for row in table[table["panel"] == panel].to_dict("records"):
            place = names.index(row[group]) + (-0.12 if row[is_filled] else 0.12)
            accuracy, low, high = (100 * row[name] for name in ("accuracy", "low", "high"))
            axis.errorbar(
                accuracy, place, xerr=[[max(0, accuracy - low)], [max(0, high - accuracy)]], fmt="o", color="black", markersize=5,
                markerfacecolor="black" if row[is_filled] else "white", capsize=2, label=labels[0 if row[is_filled] else 1],
            )  # fmt: skip
            if pd.notna(row[published]):
                axis.plot(row[published], place, "x", color="0.4", label="published")
        axis.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="accuracy after an edit, %", title=panel)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
    _finish(figure, f"{title}: {_describe_splits(table)}")
    return figure


def draw_leaks(summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Own and leak of every method as two bars with their 95 % intervals, a panel a data set; None where there are no pairs.

    Args:
        summary: as ``evaluation.tables.summarise`` gives it.
    """
    known, datasets = _those_with(summary, ["leak"])
    if not known:
        return None
    most = max(sum(entry["dataset"] == name for entry in known) for name in datasets)
    figure = Figure(figsize=(PANEL_WIDTH * len(datasets), 1.4 + 0.5 * most), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        own = [entry for entry in known if entry["dataset"] == name]
        for place, (column, shade) in enumerate((("own", "0.25"), ("leak", "0.75"))):
            heights = [number + 0.38 * (place - 0.5) for number in range(len(own))]
            shares = [100 * entry[column] for entry in own]
            errors = [[arm for entry in own for arm in _arms(entry, column)[side]] for side in (0, 1)]
            label = "the edited subject" if column == "own" else "another subject (leak)"
            axis.barh(heights, shares, 0.36, xerr=errors, color=shade, edgecolor="black", linewidth=0.6, capsize=2, label=label)
        axis.set_yticks(range(len(own)), [f"{entry['method']}\nnet {100 * entry['net']:+.0f}" for entry in own])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(f"{name} ({max(entry['leak_n'] for entry in own)} pairs)", fontsize=9)
        axis.set_xlabel("questions with the edited consequence, %", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_plane(summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy against leak with their 95 % intervals, a panel a data set; None where no leak was counted.

    A marker a method, the larger the longer an edit takes; the dotted diagonal is where an answer says nothing about its subject.

    Args:
        summary: as ``evaluation.tables.summarise`` gives it.
    """
    known, datasets = _those_with(summary, ["leak"])
    if not known:
        return None
    styles = dict(zip(dict.fromkeys(entry["method"] for entry in known), itertools.cycle(PLANE_STYLES), strict=False))
    limit = 1.12 * max(100 * (entry[f"{column}_ci95"] or [0, entry[column]])[1] for entry in known for column in ("own", "leak"))
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    figure = Figure(figsize=(PANEL_WIDTH * columns, (PANEL_WIDTH - 0.2) * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, name in itertools.zip_longest(axes, datasets):
        if name is None:
            axis.set_axis_off()
            continue
        axis.plot([0, limit], [0, limit], color="0.6", linestyle=":", linewidth=1, label="own = leak")
        for entry in (entry for entry in known if entry["dataset"] == name):
            marker, shade = styles[entry["method"]]
            x, y = 100 * entry["leak"], 100 * entry["own"]
            errors = [_arms(entry, column) for column in ("leak", "own")]
            size = 4 + 2 * math.log10(1 + 10 * (entry["seconds_per_edit"] or 0))
            axis.errorbar(x, y, xerr=errors[0], yerr=errors[1], color="0.5", linewidth=0.8, capsize=2, zorder=2)
            axis.plot(x, y, marker, color=shade, markeredgecolor="black", markersize=size, zorder=3, label=entry["method"])
        axis.set_xlim(-1, limit)
        axis.set_ylim(-1, limit)
        axis.set_title(f"{name} (n = {_range([entry['n'] for entry in known if entry['dataset'] == name])})", fontsize=9)
        axis.set_xlabel("another subject has the consequence (leak), %", fontsize=8)
        axis.set_ylabel("the edited one has it (own), %", fontsize=8)
        axis.tick_params(labelsize=8)
    entries = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=2 * columns,
        fontsize=8,
        frameon=False,
        handletextpad=0.4,
    )
    for handle in legend.get_lines():
        handle.set_markersize(6)
    return figure


def draw_told_apart(summary: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Right answers against the number of facts learnt together, a panel a data set; None where no facts were put together.

    Args:
        summary: as ``evaluation.tables.summarise`` gives it.
    """
    sizes = sorted({int(key.removeprefix(TOLD)) for entry in summary for key in entry if re.fullmatch(rf"{TOLD}\d+", key)})
    known, datasets = _those_with(summary, [f"{TOLD}{k}" for k in sizes])
    if not known:
        return None
    styles = dict(zip(dict.fromkeys(entry["method"] for entry in known), itertools.cycle(STYLES), strict=False))
    figure = Figure(figsize=(PANEL_WIDTH * len(datasets), PANEL_WIDTH), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        axis.plot(sizes, [100 / k for k in sizes], color="0.6", linestyle=":", label="a guess among the k")
        for entry in (entry for entry in known if entry["dataset"] == name):
            found = [k for k in sizes if entry.get(f"{TOLD}{k}") is not None]
            line, marker, shade = styles[entry["method"]]
            shares = [100 * entry[f"{TOLD}{k}"] for k in found]
            axis.plot(found, shares, linestyle=line, marker=marker, color=shade, markersize=5, label=entry["method"])
        axis.set_xticks(sizes)
        axis.set_ylim(0, 60)
        axis.set_xlabel("facts of one kind in one edit", fontsize=8)
        axis.set_ylabel("questions answered rightly, %", fontsize=8)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    entries = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _those_with(summary: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The entries that have a number in one of the columns, and their data sets, in order."""
    known = [entry for entry in summary if any(entry.get(column) is not None for column in columns)]
    return known, list(dict.fromkeys(entry["dataset"] for entry in known))


def _arms(entry: Mapping[str, Any], column: str) -> list[list[float]]:
    """What a 95 % interval reaches below and above a share, in per cent."""
    low, high = entry[f"{column}_ci95"] or [entry[column]] * 2
    return [[100 * (entry[column] - low)], [100 * (high - entry[column])]]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _finish(figure: Figure, title: str) -> None:
    """A title that is wrapped, and a legend below the panels with each entry once and as many columns as fit."""
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_fontsize(9)
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(LETTERS_AN_INCH * width)), fontsize=9)
    entries = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(entries, key=lambda label: label == ON_TEST)  # it is about all the lines, so it comes after them
    columns = max(1, int(LETTERS_AN_INCH * width) // (max(map(len, labels)) + 8))  # eight for the line before the words
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def _describe_splits(table: pd.DataFrame) -> str:
    low, high = table["n"].min(), table["n"].max()
    return f"{'; '.join(dict.fromkeys(table['split']))}; n = {low}" + (f" to {high}" if high > low else "")
