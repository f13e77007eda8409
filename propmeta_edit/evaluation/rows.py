"""One line a case on disk: what finished stays finished, and what does not belong together is not mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.models.generation import MAX_NEW_TOKENS, NATURAL_LIMIT
from propmeta_edit.store import JsonLines, read_lines, require_made_from

TUPLES = ("answers", "fact_generated", "facts_whole", "probes")
REMEDY = "remove the line, its case will run again"
SETTINGS = ("model_sha256", "data_sha256", "hparams_sha256", "seed", "protocol")


def protocol_of(max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """How texts were made and judged: the prompt, greedy tokens, containment in one form of Unicode, and the natural stop."""
    return f"qa-greedy-{max_new_tokens}-contains-nfkc-natural-{NATURAL_LIMIT}"


@dataclass(frozen=True)
class Row:
    """The result of one method on one case, with everything that decides it.

    ``correct`` is the headline verdict; ``efficacy`` says whether every edited fact is answered; a case that failed has its
    traceback in ``error`` and counts as wrong. ``seconds`` is its share of the time its group took, edits and questions together;
    ``cases_at_once`` is how many were in that group, and ``note`` says why it is smaller than was asked for; ``base_sha256`` is of
    the model from which the row's own was meta-trained (its own where it was not);
    ``whole`` and ``facts_whole`` are ``generated`` and ``fact_generated`` to their natural stop, on which natural verdicts rest;
    ``answer_too_long`` and ``fact_too_long`` say that ``generated`` has too few tokens to hold an accepted answer, or an object;
    ``before`` is what was said after the question without the edits; ``probes`` are further questions with what was said,
    or how unlikely either of two objects was (``evaluation.counts``);
    ``tf32`` says that fp32 products of the edit were rounded to TF32 on CUDA, and is in the file where it is on alone;
    ``precomputation`` holds the seconds of what was done once before any edit (``meta-training``, ``statistics``, ``projections``).
    """

    method: str
    dataset: str
    case_id: str
    model: str
    model_sha256: str
    data_sha256: str
    hparams_sha256: str
    seed: int
    base_sha256: str
    protocol: str = field(default_factory=protocol_of)
    versions: Mapping[str, str] = field(default_factory=dict)
    precomputation: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    tf32: bool = False
    question: str = ""
    answers: tuple[str, ...] = ()
    generated: str = ""
    correct: bool = False
    correct_word_boundary: bool = False
    whole: str | None = None
    natural_correct: bool | None = None
    answer_too_long: bool | None = None
    cloze_generated: str | None = None
    cloze_correct: bool | None = None
    fact_generated: tuple[str, ...] = ()
    efficacy: bool = False
    facts_whole: tuple[str, ...] = ()
    natural_efficacy: bool | None = None
    fact_too_long: bool | None = None
    locality_second_hop: bool | None = None
    locality_other_fact: bool | None = None
    locality_neighbourhood: bool | None = None
    seconds_per_edit: float | None = None
    seconds: float | None = None
    cases_at_once: int | None = None
    note: str | None = None
    before: str | None = None
    probes: tuple[Mapping[str, Any], ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row unique in its file."""
        return self.method, self.dataset, self.case_id

    @property
    def settings(self) -> tuple[Any, ...]:
        """What must agree among the rows of a method on a data set."""
        return tuple(getattr(self, name) for name in SETTINGS)


class RowFile:
    """``rows.jsonl``: appended and synced line by line.

    Raises:
        DataError: a broken line that is not the last, or a case that is there twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines = JsonLines(self.path, REMEDY)
        self.rows = _as_rows(self._lines.entries, self.path)
        self._keys = {row.key for row in self.rows}

    def append(self, row: Row) -> None:
        """Add a row and put it on disk before returning.

        Raises:
            DataError: the case is there already.
            OriginError: rows of the same method and data set were made from something else.
        """
        if row.key in self._keys:
            raise DataError(f"the case {row.key} is in the file already", self.path)
        self.require_same_settings(row.method, row.dataset, row.settings)
        self._lines.append(_as_entry(row))
        self.rows.append(row)
        self._keys.add(row.key)

    def forget_failed(self) -> int:
        """Take the cases that failed out of the file, so that they run again; returns how many."""
        kept = [row for row in self.rows if row.error is None]
        failed = len(self.rows) - len(kept)
        if failed:
            self._lines.rewrite(map(_as_entry, kept))
            self.rows, self._keys = kept, {row.key for row in kept}
        return failed

    def require_same_settings(self, method: str, dataset: str, settings: tuple[Any, ...]) -> None:
        """Refuse to go on with rows that were made from something else.

        Raises:
            OriginError: naming what differs.
        """
        now, what = dict(zip(SETTINGS, settings, strict=True)), f"holds rows of {method} on {dataset}"
        for before in {row.settings for row in select_rows(self.rows, method, dataset)} - {settings}:
            named = dict(zip(SETTINGS, before, strict=True))
            require_made_from(now, named, self.path, what, "choose another --output, or remove those rows")

    def finished(self, method: str, dataset: str) -> set[str]:
        """Ids of the cases that are done, failed ones included."""
        return {row.case_id for row in select_rows(self.rows, method, dataset)}


def _as_entry(row: Row) -> dict[str, Any]:
    """A row as it is in the file: without TF32 where that is off, as rows were before there was a choice."""
    return {name: value for name, value in asdict(row).items() if name != "tf32" or value}


def read_rows(path: str | Path) -> list[Row]:
    """The whole rows of a file, which is left as it is: another process may be writing to it. No file has none.

    Raises:
        DataError: a broken line that is not the last, or a case that is there twice.
    """
    return _as_rows(read_lines(Path(path), REMEDY), Path(path))


def _as_rows(entries: Sequence[Mapping[str, Any]], path: Path) -> list[Row]:
    names = {f.name for f in fields(Row)}
    rows: list[Row] = []
    first_seen: dict[tuple[str, str, str], int] = {}
    for number, values in enumerate(entries, start=1):
        unknown = sorted(set(values) - names)
        try:
            row = Row(**{**values, **{name: tuple(values.get(name, ())) for name in TUPLES}})
        except TypeError as error:
            told = f"unknown fields {', '.join(unknown)}" if unknown else str(error)
            raise DataError(f"not a row of this version ({told}); {REMEDY}", path, number) from error
        if first_seen.setdefault(row.key, number) != number:
            message = f"the case {row.key} is in line {first_seen[row.key]} already; remove one of the two"
            raise DataError(message, path, number)
        rows.append(row)
    return rows


def select_rows(rows: Iterable[Row], method: str, dataset: str) -> list[Row]:
    """The rows of one method on one data set."""
    return [row for row in rows if (row.method, row.dataset) == (method, dataset)]
