"""One line a case on disk: what finished stays finished, and what does not belong together is not mixed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.files import append_line, cut_torn_line, write_text_atomically

PROTOCOL = "qa-greedy-10-contains"
SETTINGS = ("model_sha256", "data_sha256", "hparams_sha256", "seed", "protocol")


@dataclass(frozen=True)
class Row:
    """The result of one method on one case, with everything that decides it.

    ``correct`` is the headline verdict; ``efficacy`` says whether every edited fact is answered; a case that failed has its
    traceback in ``error`` and counts as wrong. ``seconds`` is its share of the time its group took, edits and questions together;
    ``cases_at_once`` is how many were in that group, and ``note`` says why it is smaller than was asked for; ``base_sha256`` is of
    the model from which the row's own was meta-trained (its own where it was not);
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
    protocol: str = PROTOCOL
    versions: Mapping[str, str] = field(default_factory=dict)
    precomputation: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    question: str = ""
    answers: tuple[str, ...] = ()
    generated: str = ""
    correct: bool = False
    correct_word_boundary: bool = False
    cloze_generated: str | None = None
    cloze_correct: bool | None = None
    fact_generated: tuple[str, ...] = ()
    efficacy: bool = False
    second_hop_correct: bool | None = None
    other_fact_correct: bool | None = None
    neighbour_unchanged: bool | None = None
    seconds_per_edit: float | None = None
    seconds: float | None = None
    cases_at_once: int | None = None
    note: str | None = None
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

    A last line without its end (a run that was killed while writing) is cut off on opening.

    Raises:
        DataError: a broken line that is not the last, or a case that is there twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self.rows = read_rows(self.path)
        self._keys = {row.key for row in self.rows}

    def append(self, row: Row) -> None:
        """Add a row and put it on disk before returning.

        Raises:
            DataError: the case is there already, or rows of the same method and data set were made with other settings.
        """
        if row.key in self._keys:
            raise DataError(f"the case {row.key} is in the file already", self.path)
        self.require_same_settings(row.method, row.dataset, row.settings)
        append_line(self.path, _as_line(row))
        self.rows.append(row)
        self._keys.add(row.key)

    def forget_failed(self) -> int:
        """Take the cases that failed out of the file, so that they run again; returns how many."""
        kept = [row for row in self.rows if row.error is None]
        failed = len(self.rows) - len(kept)
        if failed:
            write_text_atomically(self.path, "".join(_as_line(row) + "\n" for row in kept))
            self.rows, self._keys = kept, {row.key for row in kept}
        return failed

    def require_same_settings(self, method: str, dataset: str, settings: tuple[Any, ...]) -> None:
        """Refuse to go on with rows that other settings made.

        Raises:
            DataError: naming the settings that differ.
        """
        for row in self.rows:
            if (row.method, row.dataset) == (method, dataset) and row.settings != settings:
                differing = [
                    f"{name} {old!r} -> {new!r}"
                    for name, old, new in zip(SETTINGS, row.settings, settings, strict=True)
                    if old != new
                ]
                raise DataError(
                    f"holds rows of {method} on {dataset} made with other settings ({'; '.join(differing)}); "
                    "choose another --output, or remove those rows",
                    self.path,
                )

    def finished(self, method: str, dataset: str) -> set[str]:
        """Ids of the cases that are done, failed ones included."""
        return {row.case_id for row in self.rows if (row.method, row.dataset) == (method, dataset)}


def read_rows(path: str | Path) -> list[Row]:
    """The whole rows of a file, which is left as it is: another process may be writing to it. No file has none.

    Raises:
        DataError: a broken line that is not the last, or a case that is there twice.
    """
    path = Path(path)
    if not path.exists():
        return []
    names = {f.name for f in fields(Row)}
    rows: list[Row] = []
    first_seen: dict[tuple[str, str, str], int] = {}
    # Only "\n" ends a row: str.splitlines would also cut at U+0085 and U+2028, which a model can generate.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line.decode("utf-8"))
            if not isinstance(values, dict) or set(values) - names:
                raise ValueError(f"not a row of this version: {line[:80]!r}")
            row = Row(**{**values, **{name: tuple(values.get(name, ())) for name in ("answers", "fact_generated")}})
        except (ValueError, TypeError) as error:
            raise DataError(f"broken row ({error}); remove the line, its case will run again", path, number) from error
        if first_seen.setdefault(row.key, number) != number:
            message = f"the case {row.key} is in line {first_seen[row.key]} already; remove one of the two"
            raise DataError(message, path, number)
        rows.append(row)
    return rows


def _as_line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)


def select_rows(rows: Iterable[Row], method: str, dataset: str) -> list[Row]:
    """The rows of one method on one data set."""
    return [row for row in rows if (row.method, row.dataset) == (method, dataset)]
