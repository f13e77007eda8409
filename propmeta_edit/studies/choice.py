"""The one way to choose on validation: by the cases that all candidates were asked, and never among candidates that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from propmeta_edit.evaluation.counts import ACCURACY, NET, Count
from propmeta_edit.evaluation.rows import Row, select_rows
from propmeta_edit.options import require_among

CRITERIA = {"accuracy": ACCURACY, "net": NET}


@dataclass(frozen=True)
class Choice:
    """What validation says of some candidates.

    Attributes:
        ranking: their names, the best first (of equal ones the first given); empty where nothing can be said.
        scores: by name the accuracy, or net, that decided, the mean over the data sets.
        note: what a reader must know of it; "" where that is nothing.
        num_cases: by which they were ranked.
    """

    ranking: tuple[str, ...]
    scores: dict[str, float]
    note: str
    num_cases: int = 0

    @property
    def best(self) -> str | None:
        """The candidate to take."""
        return self.ranking[0] if self.ranking else None


def choose(names: Sequence[str], datasets: Sequence[str], rows: Sequence[Row], by: str = "accuracy") -> Choice:
    """Rank candidates by their accuracy, or net, on the cases that all of them were asked, the mean over the data sets.

    Nothing is said where one was not asked yet, where they share no case, or where a case failed: it counts as wrong, which says
    nothing about the candidate.

    Args:
        names: of the methods in ``rows``.
        datasets: the validation sets, by their names in ``rows``.
        by: one of ``CRITERIA``.

    Raises:
        ConfigError: ``by`` is none of them.
    """
    require_among("by", [by], tuple(CRITERIA))
    own = {(name, data): select_rows(rows, name, data) for name in names for data in datasets}
    if not own or not all(own.values()):
        return Choice((), {}, "")
    failed = _describe_failures(own)
    if failed:
        note = f"nothing is chosen, since cases failed ({failed}); mend the cause and give the same command with --retry-failed"
        return Choice((), {}, note)
    shared = {data: set.intersection(*({row.case_id for row in own[name, data]} for name in names)) for data in datasets}
    if not all(shared.values()):
        return Choice((), {}, "nothing is chosen, since no case was asked of all variants")
    values = {key: _values(CRITERIA[by], some, shared[key[1]]) for key, some in own.items()}
    if not all(values.values()):
        return Choice((), {}, f"nothing is chosen, since a data set has no case of which {by} can be told")
    scores = {name: fmean(fmean(values[name, data]) for data in datasets) for name in names}
    number = sum(len(cases) for cases in shared.values())
    is_partly = any(len(some) > len(shared[data]) for (_, data), some in own.items())
    note = f"chosen by the n = {number} cases that all were asked" if is_partly else ""
    return Choice(tuple(sorted(names, key=lambda name: -scores[name])), scores, note, number)


def _describe_failures(own: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """How many cases failed, by candidate; "" where none did."""
    counts = Counter(name for (name, _), some in own.items() for row in some if row.error is not None)
    return ", ".join(f"{number} of {name}" for name, number in counts.items())


def _values(measure: Count, rows: Sequence[Row], cases: Collection[str]) -> list[float]:
    return [value for row in rows if row.case_id in cases for value in measure.values(row)]
