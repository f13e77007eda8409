"""Method × data set × case → rows: resumable, one progress bar a method and data set."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from tqdm import tqdm

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.rows import PROTOCOL, Row, RowFile
from propmeta_edit.evaluation.scoring import contains_answer, contains_answer_at_word_boundary
from propmeta_edit.records import Case

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseOutcome:
    """What a method's model said after the edits of a case.

    Attributes:
        generated: ten greedy tokens after the question.
        cloze_generated: after the cloze, if the case has one.
        fact_generated: after each edit's own prompt.
        seconds_per_edit: of the edit call alone; None where nothing is edited.
    """

    generated: str
    cloze_generated: str | None
    fact_generated: tuple[str, ...]
    seconds_per_edit: float | None


class Method(Protocol):
    """A row of the comparison, with its model loaded."""

    def evaluate(self, case: Case) -> CaseOutcome:
        """Edit, ask, restore."""
        ...


@dataclass(frozen=True)
class MethodSpec:
    """A row of the comparison before anything is loaded: ``build`` is called only if there are cases left to run."""

    name: str
    model: str
    model_sha256: str
    hparams_sha256: str
    build: Callable[[], Method]
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class DataSet:
    """Named cases and the hash of the file they come from."""

    name: str
    sha256: str
    cases: Sequence[Case] = field(repr=False)


def choose_cases(cases: Sequence[Case], limit: int | None, seed: int) -> list[Case]:
    """The first ``limit`` cases of a seeded shuffle: a larger limit keeps those of a smaller one."""
    shuffled = random.Random(seed).sample(list(cases), len(cases))
    return shuffled[:limit]


def run_methods(
    methods: Sequence[MethodSpec],
    datasets: Sequence[DataSet],
    rows: RowFile,
    *,
    limit: int | None,
    limits: Mapping[str, int] | None = None,
    seed: int,
    versions: Mapping[str, str],
) -> int:
    """Run what is not in ``rows`` yet; a case that raises is recorded with its traceback and the run goes on.

    Args:
        limit: cases per data set, the first of a seeded shuffle; None for all.
        limits: other numbers for single methods, e.g. fewer for slow ones; they too get the first of the same shuffle.

    Returns:
        How many of the chosen cases failed, in this run or an earlier one.

    Raises:
        DataError: ``rows`` holds cases made with other settings, or two data sets have one name (before anything runs).
    """
    if len({data.name for data in datasets}) < len(datasets):
        raise DataError(f"data sets must have different names, got {', '.join(data.name for data in datasets)}")
    for method in methods:
        for data in datasets:
            settings = (method.model_sha256, data.sha256, method.hparams_sha256, seed, PROTOCOL)
            rows.require_same_settings(method.name, data.name, settings)
    asked: set[tuple[str, str, str]] = set()
    for method in methods:
        own_limit = (limits or {}).get(method.name, limit)
        chosen = {data.name: choose_cases(data.cases, own_limit, seed) for data in datasets}
        asked |= {(method.name, data.name, case.case_id) for data in datasets for case in chosen[data.name]}
        left = {data.name: _unfinished(chosen[data.name], rows.finished(method.name, data.name)) for data in datasets}
        if not any(left.values()):
            continue
        built = method.build()
        for data in datasets:
            for case in tqdm(left[data.name], desc=f"{method.name} on {data.name}", unit="case"):
                rows.append(_run_case(method, built, data, case, seed, versions))
    return sum(row.error is not None and row.key in asked for row in rows.rows)


def _unfinished(cases: Sequence[Case], finished: Set[str]) -> list[Case]:
    return [case for case in cases if case.case_id not in finished]


def _run_case(spec: MethodSpec, method: Method, data: DataSet, case: Case, seed: int, versions: Mapping[str, str]) -> Row:
    identity = {
        "method": spec.name,
        "dataset": data.name,
        "case_id": case.case_id,
        "model": spec.model,
        "model_sha256": spec.model_sha256,
        "data_sha256": data.sha256,
        "hparams_sha256": spec.hparams_sha256,
        "versions": versions,
        "device": spec.device,
        "dtype": spec.dtype,
        "tags": case.tags,
    }
    try:
        outcome = method.evaluate(case)
    except OSError:  # the disk, not the case
        raise
    except Exception as error:
        LOG.warning("%s failed on %s: %s", spec.name, case.case_id, error)
        # Wrong, not missing, wherever a verdict was due: else failures would raise the cloze accuracy.
        cloze_correct = None if case.question.cloze is None else False
        return Row(**identity, seed=seed, cloze_correct=cloze_correct, error=traceback.format_exc())  # type: ignore[arg-type]
    return Row(**identity, seed=seed, **score(case, outcome))  # type: ignore[arg-type]


def score(case: Case, outcome: CaseOutcome) -> dict[str, object]:
    """Verdicts on what was generated, as the fields of a row."""
    answers = case.question.answers
    facts = zip(outcome.fact_generated, case.edits, strict=True)
    cloze = outcome.cloze_generated
    return {
        "generated": outcome.generated,
        "correct": contains_answer(outcome.generated, answers),
        "correct_word_boundary": contains_answer_at_word_boundary(outcome.generated, answers),
        "cloze_generated": cloze,
        "cloze_correct": None if cloze is None else contains_answer(cloze, answers),
        "fact_generated": outcome.fact_generated,
        "efficacy": all(contains_answer(text, (edit.target_new,)) for text, edit in facts),
        "seconds_per_edit": outcome.seconds_per_edit,
    }
