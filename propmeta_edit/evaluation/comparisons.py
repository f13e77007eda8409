"""What the rows say beyond their averages: paired comparisons with one method, breakdowns, and examples to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from propmeta_edit.evaluation.companions import SEEN
from propmeta_edit.evaluation.counts import ACCURACY, COUNTS, TOLD_APART, case_of, compare_counts, group_of, told_apart_counts
from propmeta_edit.evaluation.rows import Row, select_rows
from propmeta_edit.evaluation.statistics import compare_paired
from propmeta_edit.evaluation.tables import frame_to_markdown, markdown_table
from propmeta_edit.files import write_text_atomically

PARTS = (ACCURACY, *(one for one in COUNTS if one.column in ("leak", "net")))
Recipes = Mapping[str, Sequence[str]]  # by a name for them all: the methods that are one recipe, meta-trained several times
UNEDITED = "unedited"  # the row of the base as it is


def compare_with(rows: Sequence[Row], reference: str, ceiling: str = "in-context") -> list[dict[str, Any]]:
    """Each other method against ``reference`` on the cases both have, a data set at a time.

    Returns:
        One entry a (data set, method): ``reference``, the fields of ``PairedComparison``, and ``ratio_to_in_context``, the method's
        accuracy over that of ``ceiling`` on the cases both have (None where there is no such row or it is 0).
    """
    entries: list[dict[str, Any]] = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        verdicts = {
            method: {row.case_id: row.correct for row in select_rows(rows, method, dataset)}
            for method in dict.fromkeys(row.method for row in rows if row.dataset == dataset)
        }
        for method, own in verdicts.items():
            shared = [case_id for case_id in own if case_id in verdicts.get(reference, {})]
            if method == reference or not shared:
                continue
            paired = compare_paired([own[c] for c in shared], [verdicts[reference][c] for c in shared])
            ratio = _ratio(own, verdicts.get(ceiling, {}))
            names = {"dataset": dataset, "method": method, "reference": reference}
            entries.append({**names, **vars(paired), "ratio_to_in_context": ratio})
    return entries


def compare_parts(rows: Sequence[Row], reference: str) -> list[dict[str, Any]]:
    """Accuracy, leak and net of each other method against ``reference``, on the cases both have, and what of groups of facts is
    told apart; without those that have no pairs. The intervals are over what ``group_of`` says, or over groups of facts."""
    entries = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        standard = select_rows(rows, reference, dataset)
        for method in dict.fromkeys(row.method for row in rows if row.dataset == dataset and row.method != reference):
            own = select_rows(rows, method, dataset)
            k = own[0].tags.get(TOLD_APART)
            counts, group = (PARTS, group_of) if k is None else (told_apart_counts(int(k))[:1], case_of)
            for one in counts:
                found = compare_counts(own, standard, one, group)
                if found is not None:
                    entries.append({"dataset": dataset, "method": method, "reference": reference, "measure": one.column, **found})
    return entries


def pool(rows: Sequence[Row], recipes: Recipes) -> list[Row]:
    """The rows of each recipe's methods as those of one, on the cases that all of them have; none where one has no row.

    Their means are over meta-trainings too, but an interval over cases says nothing of how those differ.
    """
    pooled: list[Row] = []
    for name, methods in recipes.items():
        for dataset in dict.fromkeys(row.dataset for row in rows if row.method in methods):
            own = [select_rows(rows, method, dataset) for method in methods]
            shared = set.intersection(*({row.case_id for row in one} for one in own))
            pooled += [replace(row, method=name) for one in own for row in one if row.case_id in shared]
    return pooled


def parts_table(entries: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The entries of ``compare_parts`` for reading."""
    return pd.DataFrame(
        {
            "data set": e["dataset"],
            "method": e["method"],
            "measure": e["measure"],
            "n": e["n"],
            "difference": _in_points(e),
            "p": f"{e['p_value']:.3f}",
        }
        for e in entries
    )


def _ratio(own: dict[str, bool], ceiling: dict[str, bool]) -> float | None:
    shared = [case_id for case_id in own if case_id in ceiling]
    reached = sum(ceiling[case_id] for case_id in shared)
    return sum(own[case_id] for case_id in shared) / reached if reached else None


def break_down(rows: Sequence[Row], tag: str) -> pd.DataFrame:
    """Accuracy in percent by data set and value of ``tag`` (rows) and method (columns), with n.

    n is that of the method with the most cases; where another has fewer, its cell says how many.
    """
    tagged = [row for row in rows if tag in row.tags]
    table = pd.DataFrame(
        {"data set": r.dataset, tag: r.tags[tag], "method": r.method, "correct": 100.0 * r.correct} for r in tagged
    )
    if table.empty:
        return table
    grouped = table.groupby(["data set", tag, "method"], sort=False)["correct"]
    means, counts = grouped.mean().unstack(sort=False), grouped.count().unstack(sort=False)
    n = counts.max(axis=1).astype(int)
    few = counts.lt(n, axis=0) & counts.notna()
    cells = means.round(1).astype(object).mask(few, means.map("{:.1f}".format) + counts.map(" (n {:.0f})".format))
    cells.insert(0, "n", n)
    return cells.sort_values(["data set", "n"], ascending=[True, False])


def write_comparisons(
    rows: Sequence[Row], folder: str | Path, references: Sequence[str], num_examples: int = 5, recipes: Recipes | None = None
) -> str:
    """Write ``comparisons.json`` and ``comparisons.md`` (comparisons, breakdowns, examples of each method), which is returned.

    Every row is compared with each of ``references`` on the cases that both have, and so are all meta-trainings of a recipe
    together.
    """
    everything, rows = [*rows, *pool(rows, recipes or {})], [row for row in rows if TOLD_APART not in row.tags]
    entries, lines = [], []
    for reference in references:
        found = compare_with(rows, reference)
        entries += found
        lines += [f"## Against {reference}, paired", "", frame_to_markdown(comparison_table(found))] if found else []
        parted = [one for one in compare_parts(everything, reference) if reference not in (recipes or {}).get(one["method"], ())]
        entries += parted
        lines += [f"## Over groups, against {reference}, paired", "", frame_to_markdown(parts_table(parted))] if parted else []
    lines = lines or ["(nothing to compare)", ""]
    lines += ["Difference in points with its 95 % bootstrap interval; p: McNemar's exact test.", ""]
    lines += [
        "Over groups: intervals and p by bootstrap over entity and relation, or over groups of facts where they are told apart; "
        "n: cases, pairs of subjects (leak, net) or facts, of all meta-trainings together where a recipe has several.",
        "",
    ]
    for tag in ("entity_type", "relation", *SEEN, "hops", "last hop"):
        parts = break_down(rows, tag)
        if not parts.empty:
            lines += [f"## Accuracy % by {tag.replace('_', ' ')}", "", frame_to_markdown(parts.reset_index())]
    markdown = "\n".join([*lines, describe_examples(rows, num_examples)]) + "\n"
    folder = Path(folder)
    write_text_atomically(folder / "comparisons.json", json.dumps(entries, indent=1) + "\n")
    write_text_atomically(folder / "comparisons.md", markdown)
    return markdown


def _in_points(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def comparison_table(entries: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The entries of ``compare_with`` for reading: differences in points with their intervals."""
    return pd.DataFrame(
        {
            "data set": e["dataset"],
            "method": e["method"],
            "n": e["n"],
            "difference": _in_points(e),
            "wins / losses": f"{e['wins']} / {e['losses']}",
            "p": f"{e['p_value']:.1e}" if e["p_value"] < 0.001 else f"{e['p_value']:.3f}",
            "share of in-context accuracy": "–" if e["ratio_to_in_context"] is None else f"{e['ratio_to_in_context']:.2f}",
        }
        for e in entries
    )


def describe_examples(rows: Sequence[Row], number: int) -> str:
    """So many right and wrong answers of every method on every data set, as Markdown."""
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for method in dict.fromkeys(row.method for row in rows if row.dataset == dataset and row.method != UNEDITED):
            lines += _example_lines(rows, method, dataset, number)
    return "\n".join(lines)


def _example_lines(rows: Sequence[Row], method: str, dataset: str, number: int) -> list[str]:
    """Some right and some wrong answers of a method, beside what the model said before the edit, if that was asked."""
    before = {row.case_id: row.generated for row in select_rows(rows, UNEDITED, dataset)}
    own = [row for row in select_rows(rows, method, dataset) if row.error is None]
    lines = []
    for verdict, title in ((True, "right"), (False, "wrong")):
        chosen = [row for row in own if row.correct == verdict][:number]
        answers = [(row.question, " / ".join(row.answers), row.generated, before.get(row.case_id, "–")) for row in chosen]
        cells = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in answers]
        if cells:
            lines += [f"## {method} {title} on {dataset}", "", markdown_table(["question", "expected", method, UNEDITED], cells)]
    return lines
