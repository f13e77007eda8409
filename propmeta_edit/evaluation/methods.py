"""The rows of the comparison: what is done to the model before it is asked.

EasyEdit's algorithms reach this room as arguments (apply function and hyper-parameters); nothing here imports EasyEdit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from propmeta_edit.evaluation.generation import generate_greedily
from propmeta_edit.evaluation.runner import CaseOutcome
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.records import Case, EditRequest
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question


@dataclass
class Unedited:
    """The model as it is: what it already believes."""

    model: Any
    tokenizer: Any

    def evaluate(self, case: Case) -> CaseOutcome:
        return _ask(self.model, self.tokenizer, case, seconds_per_edit=None)


@dataclass
class InContext:
    """No edit; the facts stand before every question."""

    model: Any
    tokenizer: Any

    def evaluate(self, case: Case) -> CaseOutcome:
        return _ask(self.model, self.tokenizer, case, seconds_per_edit=None, context=case.edits)


@dataclass
class Editing:
    """An editing algorithm with EasyEdit's calling convention; weights are back to the bit after each case.

    Args:
        apply: ``apply(model, tok, requests, hparams, copy=, return_orig_weights=, keep_original_weight=)``.
        one_by_one: give the requests of a case one after another, for algorithms that take a single one (ROME).
        padding_side: of the tokenizer while editing, for algorithms that count positions from the left ("right").
    """

    model: Any
    tokenizer: Any
    apply: Callable[..., tuple[Any, Mapping[str, torch.Tensor]]]
    hparams: Any
    one_by_one: bool = False
    padding_side: str = "left"
    _is_warm: bool = False

    def evaluate(self, case: Case) -> CaseOutcome:
        if not self._is_warm:  # what happens only once in a process is not an edit's time
            with self._edited(case):
                self._is_warm = True
        with self._edited(case) as seconds:
            return _ask(self.model, self.tokenizer, case, seconds_per_edit=seconds)

    @contextmanager
    def _edited(self, case: Case) -> Iterator[float]:
        """The model with the case's edits inside, and as it was, to the bit, outside; yields seconds an edit."""
        requests = [easyedit_request(edit) for edit in case.edits]
        groups = [[request] for request in requests] if self.one_by_one else [requests]
        original: dict[str, torch.Tensor] = {}
        try:
            started = self._clock()
            for group in groups:
                for name, value in self._edit(group).items():
                    original.setdefault(name, value)
            yield (self._clock() - started) / len(requests)
        finally:
            apply_snapshot(dict(self.model.named_parameters()), original)

    def _edit(self, requests: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        padding_side = self.tokenizer.padding_side
        self.tokenizer.padding_side = self.padding_side
        try:
            _, original = self.apply(
                self.model,
                self.tokenizer,
                requests,
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=True,
            )
        finally:
            self.tokenizer.padding_side = padding_side
        return original

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        elif self.model.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def easyedit_request(edit: EditRequest) -> dict[str, Any]:
    """An edit as EasyEdit's algorithms take it."""
    request: dict[str, Any] = {
        "prompt": edit.prompt,
        "target_new": edit.target_new,
        "ground_truth": None,
        "portability": {},
        "locality": {},
    }
    return request if edit.subject is None else {**request, "subject": edit.subject}


def _ask(
    model: Any, tokenizer: Any, case: Case, seconds_per_edit: float | None, context: Sequence[EditRequest] = ()
) -> CaseOutcome:
    """The two-hop question, its cloze where there is one, and each edited fact, in one batch."""
    prompts = [format_question(case.question.text)]
    if case.question.cloze is not None:
        prompts.append(format_cloze(case.question.cloze))
    prompts += [edit.prompt for edit in case.edits]
    if context:
        prompts = [format_in_context(context, prompt) for prompt in prompts]
    texts = generate_greedily(model, tokenizer, prompts)
    return CaseOutcome(
        generated=texts[0],
        cloze_generated=texts[1] if case.question.cloze is not None else None,
        fact_generated=tuple(texts[-len(case.edits) :]),
        seconds_per_edit=seconds_per_edit,
    )
