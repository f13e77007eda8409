"""The rows of the comparison: what is done to the model before it is asked.

EasyEdit's algorithms reach this room as arguments (apply function and hyper-parameters); nothing here imports EasyEdit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from propmeta_edit.edits.compute import choose_at_once
from propmeta_edit.evaluation.runner import CaseOutcome
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.devices import free_memory
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import Case, EditRequest
from propmeta_edit.text.encoding import padded_on
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question

# What happens only once in a process is not an edit's time, so the first edit is made twice, unless it takes so many seconds that
# nothing of the kind can matter.
LONG_EDIT = 10.0


@dataclass
class Unedited:
    """The model as it is: what it already believes."""

    model: Any
    tokenizer: Any

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        return _ask(self.model, self.tokenizer, cases, before=None)


@dataclass
class InContext:
    """No edit; the facts stand before every question."""

    model: Any
    tokenizer: Any

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        return _ask(self.model, self.tokenizer, cases, before, in_context=True)


@dataclass
class Editing:
    """An editing algorithm with EasyEdit's calling convention; weights are back to the bit after each case.

    Args:
        apply: ``apply(model, tok, requests, hparams, copy=, return_orig_weights=, keep_original_weight=)``.
        one_by_one: give the requests of a case one after another, for algorithms that take a single one (ROME).
        padding_side: of the tokenizer while editing, for algorithms that count positions from the left ("right").
        write: the requests that stand for one fact, where it is written in several wordings.
    """

    model: Any
    tokenizer: Any
    apply: Callable[..., tuple[Any, Mapping[str, torch.Tensor]]]
    hparams: Any
    one_by_one: bool = False
    padding_side: str = "left"
    write: Callable[[EditRequest], list[EditRequest]] = lambda edit: [edit]
    _is_warm: bool = False

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        outcomes = []
        for case, neighbour in zip(cases, before, strict=True):
            outcome = self._evaluate(case, neighbour)
            if not self._is_warm and (outcome.seconds_per_edit or 0.0) < LONG_EDIT:
                outcome = self._evaluate(case, neighbour)
            self._is_warm = True
            outcomes.append(outcome)
        return outcomes

    def _evaluate(self, case: Case, neighbour: str | None) -> CaseOutcome:
        with self._edited(case) as seconds:
            [outcome] = _ask(self.model, self.tokenizer, [case], [neighbour])
        return replace(outcome, seconds_per_edit=seconds)

    @contextmanager
    def _edited(self, case: Case) -> Iterator[float]:
        """The model with the case's edits inside, and as it was, to the bit, outside; yields seconds an edit."""
        requests = [easyedit_request(request) for edit in case.edits for request in self.write(edit)]
        groups = [[request] for request in requests] if self.one_by_one else [requests]
        original: dict[str, torch.Tensor] = {}
        try:
            started = self._clock()
            for group in groups:
                for name, value in self._edit(group).items():
                    original.setdefault(name, value)
            yield (self._clock() - started) / len(case.edits)
        finally:
            apply_snapshot(dict(self.model.named_parameters()), original)

    def _edit(self, requests: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        with padded_on(self.tokenizer, self.padding_side):
            _, original = self.apply(
                self.model,
                self.tokenizer,
                requests,
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=True,
            )
        return original

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        elif self.model.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


@dataclass
class FineTuning:
    """FT and MetaFT: the inner loop on the case's facts; several cases side by side, each with weights of its own, as far as half
    of the free memory goes.

    Args:
        one: the same edit as EasyEdit calls it, for a single case, which is timed.
        settings: of the same edit.
    """

    model: Any
    tokenizer: Any
    one: Editing
    settings: EditSettings

    def evaluate_many(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        if len(cases) == 1:
            return self.one.evaluate_many(cases)
        parameters = select_parameters(self.model, self.settings.layers, self.settings.modules)
        fitting = choose_at_once(parameters, free_memory(self.model.device))  # a CPU would run out of memory for everybody
        if len(cases) > fitting:
            parts = [cases[start : start + fitting] for start in range(0, len(cases), fitting)]
            return [outcome for part in parts for outcome in self.evaluate_many(part)]
        groups: dict[int, list[Case]] = {}  # with rewordings from the data, cases of as many edits can have more or fewer requests
        for case in cases:
            groups.setdefault(len(self._requests_of(case)), []).append(case)
        done = {case.case_id: o for some in groups.values() for case, o in zip(some, self.evaluate_at_once(some), strict=True)}
        return [done[case.case_id] for case in cases]

    def _requests_of(self, case: Case) -> list[EditRequest]:
        return [request for edit in case.edits for request in self.one.write(edit)]

    def evaluate_at_once(self, cases: Sequence[Case]) -> list[CaseOutcome]:
        """All cases in one batch; they must have equally many requests."""
        before = _answer_neighbours(self.model, self.tokenizer, cases)
        with many_edits(self.model, self.tokenizer, [self._requests_of(case) for case in cases], self.settings):
            return _ask(self.model, self.tokenizer, cases, before)


def easyedit_request(edit: EditRequest) -> dict[str, Any]:
    """An edit as EasyEdit's algorithms take it."""
    request: dict[str, Any] = {
        "prompt": edit.prompt,
        "target_new": edit.target_new,
        "ground_truth": None,
        "portability": {},
        "locality": {},
    }
    request |= {"augmentation": [list(pair) for pair in edit.augmentation]} if edit.augmentation else {}
    request |= {"rephrasings": list(edit.rephrasings)} if edit.rephrasings else {}
    return request if edit.subject is None else {**request, "subject": edit.subject}


def _ask(
    model: Any, tokenizer: Any, cases: Sequence[Case], before: Sequence[str | None] | None, in_context: bool = False
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


def _answer_neighbours(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[str | None]:
    """What the model says after each case's neighbour; None where there is none."""
    prompts = [format_question(case.neighbour.text) for case in cases if case.neighbour is not None]
    texts = iter(generate_greedily(model, tokenizer, prompts))
    return [None if case.neighbour is None else next(texts) for case in cases]
