"""What is done to a model before it is asked: nothing, the facts put before the question, or an edit.

How an edit is made reaches this room as a function; nothing here knows EasyEdit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from propmeta_edit.edits.compute import choose_at_once
from propmeta_edit.evaluation.asking import Examiner
from propmeta_edit.evaluation.companions import COMMONEST
from propmeta_edit.evaluation.measures import CaseOutcome, as_record
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.single_edit import require_finite, write_facts
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.devices import device_of, free_memory, wait_for
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import WEIGHED, Case, EditRequest

# What happens only once in a process is not an edit's time, so the first edit is made twice, unless it takes so many seconds that
# nothing of the kind can matter.
LONG_EDIT = 10.0

EditFunction = Callable[[Sequence[EditRequest]], Mapping[str, torch.Tensor]]  # edits in place; returns the values of before


def as_it_is(edit: EditRequest) -> list[EditRequest]:
    """The requests that stand for one fact: itself."""
    return [edit]


@dataclass
class Asking:
    """What all methods have: a model that is asked."""

    examiner: Examiner

    def expect(self, cases: Sequence[Case]) -> None:
        """All cases that will come."""
        self.examiner.expect(cases)


@dataclass
class Unedited(Asking):
    """The model as it is: what it already believes."""

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        return self.examiner.ask(cases, is_edited=False)


@dataclass
class InContext(Asking):
    """No edit; the facts stand before every question."""

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        self.examiner.ask_unedited(cases)
        return self.examiner.ask(cases, in_context=True)


@dataclass
class Guessing:
    """No model at all: one text for whatever is asked, which says what accuracy can be had without knowing anything.

    Args:
        say: the text, from a case.
    """

    say: Callable[[Case], str]

    def expect(self, cases: Sequence[Case]) -> None:
        """Nothing has to be asked ahead."""

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        return [self._guess(case) for case in cases]

    def _guess(self, case: Case) -> CaseOutcome:
        text = self.say(case)
        facts = (text,) * len(case.edits)
        spoken = [probe for probe in case.probes if probe.kind not in WEIGHED]  # without a model nothing has a probability
        probes = tuple(as_record(probe, "", text) for probe in spoken)  # before it has heard a fact it says nothing
        cloze = None if case.question.cloze is None else text
        return CaseOutcome(text, cloze, facts, None, whole=text, facts_whole=facts, before="", probes=probes)


def newest_object(case: Case) -> str:
    """The object of the last fact that was written."""
    return case.edits[-1].target_new


def commonest_answer(case: Case) -> str:
    """The answer that most cases of the relation have, in the same data set (``companions.with_commonest_answer``)."""
    return case.tags[COMMONEST]


@dataclass
class Editing(Asking):
    """One case after another, each edit timed; weights are back to the bit after each case.

    Args:
        edit: writes a case's requests into the model and returns what stood there; if it raises, the model is as it was.
        write: the requests that stand for one fact, where it is written in several wordings.
    """

    edit: EditFunction
    write: Callable[[EditRequest], list[EditRequest]] = as_it_is
    _is_warm: bool = False

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        self.examiner.ask_unedited(cases)
        parameters, outcomes = dict(self.examiner.model.named_parameters()), []
        for case in cases:
            requests = requests_of(case, self.write)
            for _ in range(2):  # the first edit of all only warms up, and is made again
                started = self._clock()
                original = self.edit(requests)
                try:
                    seconds = (self._clock() - started) / len(case.edits)
                    counts, self._is_warm = self._is_warm or seconds >= LONG_EDIT, True
                    if counts:
                        [outcome] = self.examiner.ask([case])
                        outcomes.append(replace(outcome, seconds_per_edit=seconds))
                        break
                finally:
                    apply_snapshot(parameters, original)
        return outcomes

    def _clock(self) -> float:
        wait_for(self.examiner.model.device)
        return time.perf_counter()


@dataclass
class FineTuning(Asking):
    """FT and MetaFT: the inner loop on the case's facts; a single case is timed, several are edited side by side, each with weights
    of its own, as far as half of the free memory goes."""

    settings: EditSettings
    write: Callable[[EditRequest], list[EditRequest]] = as_it_is

    def __post_init__(self) -> None:
        loaded = self.examiner.model, self.examiner.tokenizer
        self._alone = Editing(self.examiner, lambda requests: write_facts(*loaded, requests, self.settings), self.write)

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        if len(cases) == 1:
            return self._alone.evaluate_many(cases)
        model = self.examiner.model
        parameters = select_parameters(model, self.settings.layers, self.settings.modules)
        fitting = choose_at_once(
            parameters, self.settings, free_memory(device_of(parameters))
        )  # a CPU would run out of memory for everybody
        if len(cases) > fitting:
            parts = [cases[start : start + fitting] for start in range(0, len(cases), fitting)]
            return [outcome for part in parts for outcome in self.evaluate_many(part)]
        groups: dict[int, list[Case]] = {}  # with rewordings from the data, cases of as many edits can have more or fewer requests
        for case in cases:
            groups.setdefault(len(requests_of(case, self.write)), []).append(case)
        done = {case.case_id: o for some in groups.values() for case, o in zip(some, self._evaluate_at_once(some), strict=True)}
        return [done[case.case_id] for case in cases]

    def _evaluate_at_once(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        """All cases in one batch; they must have equally many requests. One that diverges fails them all, and is found alone."""
        self.examiner.ask_unedited(cases)
        loaded = self.examiner.model, self.examiner.tokenizer
        with many_edits(*loaded, [requests_of(case, self.write) for case in cases], self.settings) as adapted:
            require_finite(adapted.moved, self.settings)
            return self.examiner.ask(cases)


def requests_of(case: Case, write: Callable[[EditRequest], list[EditRequest]]) -> list[EditRequest]:
    """Everything that is written for a case, fact by fact."""
    return [request for edit in case.edits for request in write(edit)]
