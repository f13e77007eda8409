"""What a gain is made of: shares over further questions than a case's own, over pairs of subjects, and over pairs of objects.

All of it is counted from the texts and probabilities that a row keeps (``Row.probes``); docs/measures.md has the definitions and
where they are from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.evaluation.statistics import ratio_interval
from propmeta_edit.evaluation.weighing import NEW, TRUE
from propmeta_edit.records import (
    EDITED,
    ELSEWHERE,
    FACT,
    NEIGHBOUR,
    OTHER,
    PARAPHRASE,
    REAL,
    REWORDED,
    SAME_FACT,
    TOGETHER,
    WEIGHED,
)

TOLD_APART, TOLD_APART_OF = "told_apart", "told_apart_of"  # tags of a group of facts: how many, and of which data set


@dataclass(frozen=True)
class Count:
    """One measure over any number of questions or pairs a row.

    Args:
        column: of a table; ``_n`` and ``_ci95`` stand beside it.
        title: of the column, for reading.
        values: one number a question or pair that counts; none where the row has none.
    """

    column: str
    title: str
    values: Callable[[Row], list[float]]


def _probes(row: Row, kind: str) -> list[Mapping[str, Any]]:
    return [probe for probe in row.probes if probe["kind"] == kind]


def _compared(row: Row, kind: str) -> list[Mapping[str, Any]]:
    """Those that were asked before the edit too; a row without an edit has none."""
    return [probe for probe in _probes(row, kind) if probe["before"] is not None]


def _is_right(probe: Mapping[str, Any]) -> bool:
    return contains_answer(probe["after"], probe["answers"])


def _right(kind: str) -> Callable[[Row], list[float]]:
    return lambda row: [float(_is_right(probe)) for probe in _probes(row, kind)]


def _all_questions(row: Row) -> list[float]:
    further = _right(SAME_FACT)(row)
    return [float(row.correct), *further] if any(probe["kind"] not in WEIGHED for probe in row.probes) else []


def _pairs(row: Row) -> list[tuple[float, float]]:
    return find_pairs(row.correct, row.before, row.answers, _compared(row, OTHER))


def find_pairs(
    is_right: bool, before: str | None, answers: Sequence[str], others: Iterable[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """(own, leak) of each pair of the edited subject and another one, where neither had the edited consequence before.

    ``own``: the question about the edited subject now has it; ``leak``: the same question about the other subject does.

    Args:
        is_right: ``own``.
        before: what was said about the edited subject before the edit; None if nobody asked.
        answers: the edited consequence.
        others: the other subjects' probes, as rows keep them.
    """
    if before is None or contains_answer(before, answers):
        return []
    news = [probe for probe in others if not contains_answer(probe["before"], probe["against"])]
    return [(float(is_right), float(contains_answer(probe["after"], probe["against"]))) for probe in news]


def _target_elsewhere(row: Row) -> list[float]:
    news = [probe for probe in _compared(row, ELSEWHERE) if not contains_answer(probe["before"], probe["against"])]
    return [float(contains_answer(probe["after"], probe["against"])) for probe in news]


def _known_real(row: Row) -> list[float]:
    known = [probe for probe in _compared(row, REAL) if contains_answer(probe["before"], probe["answers"])]
    return [float(_is_right(probe)) for probe in known]


def _crossed(row: Row) -> list[float]:
    asked = _probes(row, TOGETHER)
    return [float(not _is_right(probe) and contains_answer(probe["after"], probe["against"])) for probe in asked]


def _likelier(kind: str, wanted: int) -> Callable[[Row], list[float]]:
    """Whether the wanted one of two objects is the likelier one; it is not where the case failed."""

    def values(row: Row) -> list[float]:
        return [float(p["nats"] is not None and p["nats"][wanted] < p["nats"][1 - wanted]) for p in _probes(row, kind)]

    return values


NET = Count("net", "net", lambda row: [own - leak for own, leak in _pairs(row)])
COUNTS = (
    Count("accuracy_all", "accuracy, all questions of the fact %", _all_questions),
    Count("accuracy_paraphrase", "paraphrased question %", _right(PARAPHRASE)),
    Count("accuracy_fact_question", "fact as a question %", _right(FACT)),
    Count("own", "own %", lambda row: [own for own, _ in _pairs(row)]),
    Count("leak", "leak %", lambda row: [leak for _, leak in _pairs(row)]),
    NET,
    Count("unchanged", "other subject unchanged %", lambda row: [float(p["after"] == p["before"]) for p in _compared(row, OTHER)]),
    Count("target_elsewhere", "target elsewhere %", _target_elsewhere),
    Count("locality_real", "locality, real neighbours %", _known_real),
    Count("es", "ES %", _likelier(EDITED, NEW)),
    Count("ps", "PS %", _likelier(REWORDED, NEW)),
    Count("ns", "NS %", _likelier(NEIGHBOUR, TRUE)),
)


ACCURACY = Count("accuracy", "accuracy %", lambda row: [float(row.correct)])


def told_apart_counts(k: int) -> tuple[Count, Count]:
    """Of k facts of one kind in one edit: each asked, the share that is right, and that is another one's answer."""
    return (
        Count(f"told_apart_{k}", f"told apart, {k} facts %", _right(TOGETHER)),
        Count(f"crossed_{k}", f"crossed, {k} facts %", _crossed),
    )


def group_of(row: Row) -> tuple[str, ...]:
    """What rows have in common that makes their verdicts alike: entity and relation where they are told, else relation and answer.

    Of CRE's questions out of distribution there are only 43 such groups, so that an interval over cases would be too narrow.
    """
    if "entity_name" in row.tags:
        return row.tags["entity_name"], row.tags.get("relation", "")
    return row.tags.get("relation", ""), row.answers[0] if row.answers else ""


def case_of(row: Row) -> str:
    """A group of its own for each case: for those that are groups of facts."""
    return row.case_id


def count(rows: Sequence[Row], counts: Sequence[Count], group: Callable[[Row], Any] = group_of) -> dict[str, Any]:
    """Each count's mean over all that was counted, n, and the 95 % percentile bootstrap interval over groups of rows.

    Returns:
        ``column``, ``column_n`` and ``column_ci95`` of every count; None where nothing was counted, and no interval from one group.
    """
    found: dict[str, Any] = {}
    for one in counts:
        sums = _sum_by_group(rows, one, group)
        n = int(sum(number for _, number in sums.values()))
        found[one.column] = sum(total for total, _ in sums.values()) / n if n else None
        found[f"{one.column}_n"] = n
        found[f"{one.column}_ci95"] = _interval(sums) if len(sums) > 1 else None
    return found


def _sum_by_group(rows: Sequence[Row], one: Count, group: Callable[[Row], Any] = group_of) -> dict[Any, tuple[float, float]]:
    """(sum, number) of a count's values by group of rows; groups without a value are left out."""
    sums: dict[Any, tuple[float, float]] = {}
    for row in rows:
        if values := one.values(row):
            total, number = sums.get(group(row), (0.0, 0.0))
            sums[group(row)] = total + sum(values), number + len(values)
    return sums


def compare_counts(
    first: Sequence[Row], second: Sequence[Row], one: Count, group: Callable[[Row], Any] = group_of
) -> dict[str, Any] | None:
    """A count of one method minus that of another, on the cases both have, with its 95 % bootstrap interval over groups.

    Either may have several rows a case, of several meta-trainings: the difference is then one of means over them.

    Returns:
        ``n`` (pairs or questions of the first), ``difference``, ``low``, ``high`` and ``p_value``, two-sided by the same bootstrap
        (no smaller than 1 / 1,000); None where fewer than two groups have values in both.
    """
    shared = {row.case_id for row in first} & {row.case_id for row in second}
    sums = [_sum_by_group([row for row in rows if row.case_id in shared], one, group) for rows in (first, second)]
    groups = sorted(set(sums[0]) & set(sums[1]))
    if len(groups) < 2:
        return None
    totals = np.array([[(*side[group],) for group in groups] for side in sums])  # [2, groups, (sum, number)]
    weights = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=2000)
    drawn = weights @ totals
    differences = drawn[0, :, 0] / drawn[0, :, 1] - drawn[1, :, 0] / drawn[1, :, 1]
    means = totals[:, :, 0].sum(axis=1) / totals[:, :, 1].sum(axis=1)
    low, high = np.percentile(differences, [2.5, 97.5])
    p_value = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    return {
        "n": int(totals[0, :, 1].sum()),
        "difference": float(means[0] - means[1]),
        "low": float(low),
        "high": float(high),
        "p_value": float(min(1.0, max(p_value, 1 / 1000))),
    }


def _interval(sums: Mapping[Any, Sequence[float]]) -> list[float]:
    totals = np.array(list(sums.values()))
    _, low, high = ratio_interval(totals[:, :1], totals[:, 1:])
    return [float(low[0]), float(high[0])]


def count_told_apart(rows: Sequence[Row], k: int) -> dict[str, Any]:
    """The same of rows that are groups of k facts, each a group of its own."""
    own = [row for row in rows if row.tags.get(TOLD_APART) == str(k)]
    return {**count(own, told_apart_counts(k), case_of), f"told_apart_{k}_groups": len(own)}
