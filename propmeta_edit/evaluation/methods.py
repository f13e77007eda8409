"""What is done to a model before it is asked: nothing, the facts put before the question, or an edit.

How an edit is made reaches this room as a function; nothing here knows EasyEdit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from propmeta_edit.edits.compute import choose_at_once
from propmeta_edit.evaluation.measures import CaseOutcome
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.single_edit import write_facts
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.devices import free_memory, wait_for
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import Case, EditRequest
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question

# What happens only once in a process is not an edit's time, so the first edit is made twice, unless it takes so many seconds that
# nothing of the kind can matter.
LONG_EDIT = 10.0

EditFunction = Callable[[Sequence[EditRequest]], Mapping[str, torch.Tensor]]  # edits in place; returns the values of before


def as_it_is(edit: EditRequest) -> list[EditRequest]:
    """The requests that stand for one fact: itself."""
    return [edit]


@dataclass
class Unedited:
    """The model as it is: what it already believes."""

    model: LanguageModel
    tokenizer: Tokenizer

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        return _ask(self.model, self.tokenizer, cases, before=None)


@dataclass
class InContext:
    """No edit; the facts stand before every question."""

    model: LanguageModel
    tokenizer: Tokenizer

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        return _ask(self.model, self.tokenizer, cases, before, in_context=True)


@dataclass
class Editing:
    """One case after another, each edit timed; weights are back to the bit after each case.

    Args:
        edit: writes a case's requests into ``model`` and returns what stood there; if it raises, the model is as it was.
        write: the requests that stand for one fact, where it is written in several wordings.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    edit: EditFunction
    write: Callable[[EditRequest], list[EditRequest]] = as_it_is
    _is_warm: bool = False

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        parameters, outcomes = dict(self.model.named_parameters()), []
        for case, neighbour in zip(cases, before, strict=True):
            requests = requests_of(case, self.write)
            for _ in range(2):  # the first edit of all only warms up, and is made again
                started = self._clock()
                original = self.edit(requests)
                try:
                    seconds = (self._clock() - started) / len(case.edits)
                    counts, self._is_warm = self._is_warm or seconds >= LONG_EDIT, True
                    if counts:
                        [outcome] = _ask(self.model, self.tokenizer, [case], [neighbour])
                        outcomes.append(replace(outcome, seconds_per_edit=seconds))
                        break
                finally:
                    apply_snapshot(parameters, original)
        return outcomes

    def _clock(self) -> float:
        wait_for(self.model.device)
        return time.perf_counter()


@dataclass
class FineTuning:
    """FT and MetaFT: the inner loop on the case's facts; a single case is timed, several are edited side by side, each with weights
    of its own, as far as half of the free memory goes."""

    model: LanguageModel
    tokenizer: Tokenizer
    settings: EditSettings
    write: Callable[[EditRequest], list[EditRequest]] = as_it_is

    def __post_init__(self) -> None:
        loaded = self.model, self.tokenizer
        self._alone = Editing(*loaded, lambda requests: write_facts(*loaded, requests, self.settings), self.write)

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        if len(cases) == 1:
            return self._alone.evaluate_many(cases)
        parameters = select_parameters(self.model, self.settings.layers, self.settings.modules)
        fitting = choose_at_once(parameters, free_memory(self.model.device))  # a CPU would run out of memory for everybody
        if len(cases) > fitting:
            parts = [cases[start : start + fitting] for start in range(0, len(cases), fitting)]
            return [outcome for part in parts for outcome in self.evaluate_many(part)]
        groups: dict[int, list[Case]] = {}  # with rewordings from the data, cases of as many edits can have more or fewer requests
        for case in cases:
            groups.setdefault(len(requests_of(case, self.write)), []).append(case)
        done = {case.case_id: o for some in groups.values() for case, o in zip(some, self._evaluate_at_once(some), strict=True)}
        return [done[case.case_id] for case in cases]

    def _evaluate_at_once(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        """All cases in one batch; they must have equally many requests."""
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        with many_edits(self.model, self.tokenizer, [requests_of(case, self.write) for case in cases], self.settings):
            return _ask(self.model, self.tokenizer, cases, before)


def requests_of(case: Case, write: Callable[[EditRequest], list[EditRequest]]) -> list[EditRequest]:
    """Everything that is written for a case, fact by fact."""
    return [request for edit in case.edits for request in write(edit)]


def _ask(
    model: LanguageModel, tokenizer: Tokenizer, cases: Sequence[Case], before: Sequence[str | None] | None, in_context: bool = False
) -> list[CaseOutcome]:
    """Every prompt of every case in one batch, those of a case side by side.

    Args:
        before: what the model said after each neighbour without the edits; None if there are no edits to compare with.
        in_context: put a case's facts before its prompts.
    """
    wanted = [_prompts_of(case) for case in cases]
    if in_context:
        wanted = [{k: format_in_context(case.edits, p) for k, p in w.items()} for case, w in zip(cases, wanted, strict=True)]
    per_case = max(len(prompts) for prompts in wanted)  # equally many rows a case, as edits side by side need them
    padded = [[*prompts.values(), *[next(iter(prompts.values()))] * (per_case - len(prompts))] for prompts in wanted]
    texts = generate_greedily(
        model, tokenizer, [prompt for prompts in padded for prompt in prompts], batch_size=len(cases) * per_case
    )
    outcomes = []
    for number, (case, prompts) in enumerate(zip(cases, wanted, strict=True)):
        said = dict(zip(prompts, texts[number * per_case : (number + 1) * per_case], strict=False))
        outcomes.append(
            CaseOutcome(
                generated=said["question"],
                cloze_generated=said.get("cloze"),
                fact_generated=tuple(said[f"fact {k}"] for k in range(len(case.edits))),
                seconds_per_edit=None,
                second_hop_generated=said.get("second hop"),
                other_fact_generated=said.get("other fact"),
                neighbour_generated=None if before is None else said.get("neighbour"),
                neighbour_before=None if before is None else before[number],
            )
        )
    return outcomes


def _prompts_of(case: Case) -> dict[str, str]:
    """What a model is asked about a case, by name."""
    prompts = {"question": format_question(case.question.text)}
    if case.question.cloze is not None:
        prompts["cloze"] = format_cloze(case.question.cloze)
    prompts |= {f"fact {number}": edit.prompt for number, edit in enumerate(case.edits)}
    singles = {"second hop": case.second_hop, "other fact": case.other_fact, "neighbour": case.neighbour}
    return prompts | {name: format_question(question.text) for name, question in singles.items() if question is not None}


def _answer_neighbours(model: LanguageModel, tokenizer: Tokenizer, cases: Sequence[Case]) -> list[str | None]:
    """What the model says after each case's neighbour; None where there is none."""
    prompts = [format_question(case.neighbour.text) for case in cases if case.neighbour is not None]
    texts = iter(generate_greedily(model, tokenizer, prompts))
    return [None if case.neighbour is None else next(texts) for case in cases]
