"""Method × data set × case → rows: resumable, one progress bar a method and data set."""

from __future__ import annotations

import itertools
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.measures import CaseOutcome, judge, judge_failed
from propmeta_edit.evaluation.rows import Row, RowFile, protocol_of, select_rows
from propmeta_edit.models.devices import is_out_of_memory
from propmeta_edit.progress import progress_bar
from propmeta_edit.records import Case

LOG = logging.getLogger(__name__)
Item = TypeVar("Item")
TIMED_CASES = 10  # of a method and data set, run one by one, so that there is a time per edit


class Method(Protocol):
    """A row of the comparison, with its model loaded."""

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        """Edit, ask, restore: each case by itself. With a single case, ``seconds_per_edit`` is what one edit takes."""
        ...

    def expect(self, cases: Sequence[Case]) -> None:
        """All cases that will come."""
        ...


@dataclass(frozen=True)
class MethodSpec:
    """A row of the comparison before anything is loaded: ``build`` is called only if there are cases left to run.

    Args:
        check: called for every row with cases left before the first of them runs; raises what would stop ``build``.
        base_sha256: of the model from which this one was meta-trained; "" for this one itself.
        adapt: makes the row's own cases from those of the data set, for controls that edit something else.
        precomputation: the seconds of what was done once, before any edit, by its name.
        cases_at_once: how many are given to the method together, after the first ``TIMED_CASES``, which it gets one by one.
        settings: what ``hparams_sha256`` stands for and whatever else a reader wants to know, as plain JSON values.
    """

    name: str
    model: str
    model_sha256: str
    hparams_sha256: str
    build: Callable[[], Method]
    dtype: str = "float32"
    device: str = "cpu"
    adapt: Callable[[Sequence[Case]], Sequence[Case]] = list
    cases_at_once: int = 1
    check: Callable[[], None] = lambda: None
    precomputation: Mapping[str, float] = field(default_factory=dict)
    base_sha256: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = field(default_factory=protocol_of)

    def make_row(self, data: DataSet, case_id: str, seed: int, **results: Any) -> Row:
        """A row of this method, with everything that decides it."""
        return Row(
            method=self.name,
            dataset=data.name,
            case_id=case_id,
            model=self.model,
            model_sha256=self.model_sha256,
            base_sha256=self.base_sha256 or self.model_sha256,
            data_sha256=data.sha256,
            hparams_sha256=self.hparams_sha256,
            seed=seed,
            precomputation=self.precomputation,
            device=self.device,
            dtype=self.dtype,
            tf32=bool(self.settings.get("tf32", False)),
            protocol=self.protocol,
            **results,
        )


@dataclass(frozen=True)
class DataSet:
    """Named cases and the hash of the file they come from."""

    name: str
    sha256: str
    cases: Sequence[Case] = field(repr=False)


@dataclass(frozen=True)
class Work:
    """Cases that are run together, and the data set they are from (its name and hash alone)."""

    data: DataSet
    group: Sequence[Case] = field(repr=False)


Execute = Callable[[MethodSpec, Sequence[Work], int, Mapping[str, str]], Iterator[list[Row]]]


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
    budget: float | None = None,
    seed: int,
    versions: Mapping[str, str],
    execute: Execute | None = None,
) -> int:
    """Run what is not in ``rows`` yet; a case that raises is recorded with its traceback and the run goes on.

    Args:
        limit: cases per data set, the first of a seeded shuffle; None for all.
        limits: other numbers for single methods, e.g. fewer for slow ones; they too get the first of the same shuffle.
        budget: seconds a method may take on these data sets, those of its rows on disk included; it stops after the group of cases
            that uses it up, having gone through the data sets by turns. At least one group of each data set is run.
        execute: where a method's cases are run; in this process unless given (``evaluation.workers`` runs them on Ray).

    Returns:
        How many of the chosen cases failed, in this run or an earlier one; those of a method whose model found no memory are among
        them, though they have no rows and run when the same is called again.

    Raises:
        DataError: ``rows`` holds cases made with other settings, or a name of a method or data set, or the id of a case, is not
            unique (before anything runs).
    """
    require_fitting(methods, datasets, rows, seed)
    chosen = _choose_all(methods, datasets, limit, limits or {}, seed)
    left = [(method, work) for method in methods if (work := _work_left(method, datasets, chosen, rows, budget))]
    for method, _ in left:
        method.check()
    lacking_memory = 0
    for method, work in left:
        bar = progress_bar(total=sum(len(item.group) for item in work), desc=method.name, unit="case")
        try:
            for done in (execute or run_here)(method, work, seed, versions):
                for row in done:
                    rows.append(row)
                bar.set_postfix_str(done[0].dataset)
                bar.update(len(done))
                if budget is not None and _is_used_up(budget, method, datasets, rows):
                    break
        except Exception as error:  # while a case runs it is the case's own failure: this is from loading the model
            if not is_out_of_memory(error):
                raise
            LOG.error("%s is left out: there is no memory for its model (%s)", method.name, error)
            lacking_memory += sum(len(item.group) for item in work)
        finally:
            bar.close()
    return lacking_memory + _count_failed(chosen, rows)


Chosen = Mapping[tuple[str, str], Sequence[Case]]  # by method and data set


def _choose_all(
    methods: Sequence[MethodSpec], datasets: Sequence[DataSet], limit: int | None, limits: Mapping[str, int], seed: int
) -> Chosen:
    """Each method's own cases of each data set."""
    return {
        (method.name, data.name): method.adapt(choose_cases(data.cases, limits.get(method.name, limit), seed))
        for method in methods
        for data in datasets
    }


def _count_failed(chosen: Chosen, rows: RowFile) -> int:
    """How many of these cases failed, in this run or an earlier one."""
    asked = {(*where, case.case_id) for where, cases in chosen.items() for case in cases}
    return sum(row.error is not None and row.key in asked for row in rows.rows)


def require_fitting(methods: Sequence[MethodSpec], datasets: Sequence[DataSet], rows: RowFile, seed: int) -> None:
    """Refuse what cannot stand in one file of rows, before anything runs.

    Raises:
        DataError: rows made with other settings, or a name or an id that is not unique.
    """
    _require_unique("methods", [method.name for method in methods])
    _require_unique("data sets", [data.name for data in datasets])
    for data in datasets:
        _require_unique(f"cases of {data.name}", [case.case_id for case in data.cases])
    for method in methods:
        for data in datasets:
            rows.require_same_settings(method.name, data.name, method.make_row(data, "", seed).settings)


def count_left(method: MethodSpec, datasets: Sequence[DataSet], rows: RowFile, limit: int | None, seed: int) -> int:
    """How many of a method's cases have no row yet."""
    left = 0
    for data in datasets:
        finished = rows.finished(method.name, data.name)
        left += sum(case.case_id not in finished for case in method.adapt(choose_cases(data.cases, limit, seed)))
    return left


def _require_unique(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{what} must have different names, but there are several of {', '.join(twice[:5])}")


def _work_left(
    method: MethodSpec,
    datasets: Sequence[DataSet],
    chosen: Chosen,
    rows: RowFile,
    budget: float | None,
) -> list[Work]:
    """The groups of a method's cases that are to run; with a budget, the data sets by turns."""
    if budget is not None and _is_used_up(budget, method, datasets, rows):
        return []
    queues = [
        [
            Work(replace(data, cases=()), group)
            for group in _unfinished_groups(method, chosen[method.name, data.name], rows, data.name)
        ]
        for data in datasets
    ]
    if budget is None:
        return [item for queue in queues for item in queue]
    return [item for turn in itertools.zip_longest(*queues) for item in turn if item is not None]


def _is_used_up(budget: float, method: MethodSpec, datasets: Sequence[DataSet], rows: RowFile) -> bool:
    """Whether the method's rows on disk have taken ``budget`` seconds, with some of every data set among them."""
    asked = [select_rows(rows.rows, method.name, data.name) for data in datasets]
    return all(asked) and sum(row.seconds or 0.0 for some in asked for row in some) >= budget


def run_here(method: MethodSpec, work: Sequence[Work], seed: int, versions: Mapping[str, str]) -> Iterator[list[Row]]:
    """The rows of each group in turn, in this process, on one load of the model."""
    built = method.build()
    built.expect([case for item in work for case in item.group])
    return map(GroupRunner(method, built, seed, versions), work)


def batches_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive groups of at most ``size`` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _unfinished_groups(method: MethodSpec, chosen: Sequence[Case], rows: RowFile, dataset: str) -> list[Sequence[Case]]:
    """The cases that are left, the first of all one by one; cases edited together have equally many edits."""
    finished = rows.finished(method.name, dataset)
    timed = [[case] for case in chosen[:TIMED_CASES] if case.case_id not in finished]
    groups: dict[int, list[Case]] = {}
    for case in chosen[TIMED_CASES:]:
        if case.case_id not in finished:
            groups.setdefault(len(case.edits), []).append(case)
    batches = [batch for group in groups.values() for batch in batches_of(group, method.cases_at_once)]
    place = {case.case_id: number for number, case in enumerate(chosen)}
    # In the order of their first cases: a run that stops early has seen every kind of case.
    return [*timed, *sorted(batches, key=lambda batch: place[batch[0].case_id])]


@dataclass
class GroupRunner:
    """Runs groups of cases with a method that is loaded; where memory runs out, in smaller groups from then on.

    Args:
        at_once: at most so many cases together; None until memory ran out.
    """

    spec: MethodSpec
    method: Method
    seed: int
    versions: Mapping[str, str]
    at_once: int | None = None
    note: str | None = None

    def __call__(self, work: Work) -> list[Row]:
        """The rows of cases that are run together; if they fail together, each is tried by itself."""
        started = time.perf_counter()
        rows: list[Row] = []
        left = [work.group]
        while left:
            group = left.pop(0)
            if self.at_once is not None and len(group) > self.at_once:
                left = [*batches_of(group, self.at_once), *left]
                continue
            try:
                outcomes = self.method.evaluate_many(group)
                rows += [
                    self._make_row(work.data, case, judge(case, o), len(group)) for case, o in zip(group, outcomes, strict=True)
                ]
                continue
            except OSError:  # the disk, not the cases
                raise
            except Exception as error:
                if len(group) == 1:
                    rows.append(self._make_failed_row(work.data, group[0], error))
                    continue
                smaller = self._give_up(group, error)
            # Outside the handler: the error's traceback holds what the failed attempt had allocated.
            left = [*batches_of(group, smaller), *left]
        return [replace(row, seconds=(time.perf_counter() - started) / len(rows)) for row in rows]

    def _give_up(self, group: Sequence[Case], error: Exception) -> int:
        """How many of the cases that failed together to try at once: half of them if memory ran out, else one."""
        tried = 1
        if is_out_of_memory(error):
            tried = self.at_once = len(group) // 2
            self.note = f"out of memory with {len(group)} cases at once"
        LOG.warning("%s failed on %d cases at once (%s); trying %d", self.spec.name, len(group), error, tried)
        return tried

    def _make_failed_row(self, data: DataSet, case: Case, error: Exception) -> Row:
        LOG.warning("%s failed on %s: %s", self.spec.name, case.case_id, error)
        return self._make_row(data, case, {**judge_failed(case), "error": "".join(traceback.format_exception(error))})

    def _make_row(self, data: DataSet, case: Case, results: Mapping[str, object], together: int = 1) -> Row:
        return self.spec.make_row(
            data,
            case.case_id,
            self.seed,
            versions=self.versions,
            question=case.question.text,
            answers=case.question.answers,
            cases_at_once=together,
            note=self.note,
            tags=case.tags,
            **results,
        )
