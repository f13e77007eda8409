"""The two loops as plainly as they can be written: torch's optimiser, the whole model's forward pass, one text at a time.

The engine is measured against these, and the tests hold it to the same numbers. The outer gradient is also written with ``higher``,
as meta-learning code commonly is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import nn
from torch.nn import functional as F

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest, MetaTask
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.prompts import format_question


def text_loss(model: LanguageModel, tokenizer: Tokenizer, context: str, answer: str) -> torch.Tensor:
    """Mean cross-entropy on the answer's tokens."""
    encoded = TextEncoder(tokenizer, model.config).encode_answer(context, answer)
    input_ids, labels = (torch.tensor([row], device=model.device) for row in encoded)
    logits = model(input_ids=input_ids).logits[0, :-1]
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, labels[0, 1:], ignore_index=-100)


def edit(
    model: LanguageModel,
    tokenizer: Tokenizer,
    parameters: Mapping[str, nn.Parameter],
    requests: Sequence[EditRequest],
    settings: EditSettings,
) -> None:
    """K passes over the facts, in place."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.inner_lr, weight_decay=settings.weight_decay)
    for _ in range(settings.num_inner_steps):
        for request in requests:
            optimizer.zero_grad()
            torch.autograd.backward(text_loss(model, tokenizer, request.prompt, request.target_new))
            optimizer.step()
    optimizer.zero_grad()


def task_gradients(
    model: LanguageModel,
    tokenizer: Tokenizer,
    parameters: Mapping[str, nn.Parameter],
    task: MetaTask,
    settings: EditSettings,
    template: str = "qa",
) -> tuple[list[torch.Tensor], float]:
    """First-order MAML's gradient of one task and its related loss; the parameters are put back."""
    before = [p.detach().clone() for p in parameters.values()]
    edit(model, tokenizer, parameters, [task.target], settings)
    loss = text_loss(model, tokenizer, format_question(task.related.text, template), task.related.answers[0])
    gradients = list(torch.autograd.grad(loss, list(parameters.values())))
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), before, strict=True):
            parameter.copy_(value)
    return gradients, loss.item()


def task_gradients_by_higher(
    model: LanguageModel, tokenizer: Tokenizer, parameters: Mapping[str, nn.Parameter], task: MetaTask, settings: EditSettings
) -> tuple[list[torch.Tensor], float]:
    """The same by ``higher``, which has no AdamW: Adam, so the two agree where ``weight_decay`` is 0."""
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.inner_lr)
    with (
        _slices_of_modules_are_lists(),
        higher.innerloop_ctx(model, optimizer, copy_initial_weights=True, track_higher_grads=False) as (adapted, inner),
    ):
        for _ in range(settings.num_inner_steps):
            inner.step(text_loss(adapted, tokenizer, task.target.prompt, task.target.target_new))
        loss = text_loss(adapted, tokenizer, format_question(task.related.text), task.related.answers[0])
        moved = dict(adapted.named_parameters())
        return list(torch.autograd.grad(loss, [moved[name] for name in parameters])), loss.item()


@contextmanager
def _slices_of_modules_are_lists() -> Iterator[None]:
    """``higher`` patches a model's module lists so that they cannot be sliced, which the models of transformers do."""
    original = nn.ModuleList.__getitem__

    def get(self: nn.ModuleList, index: int | slice) -> Any:
        return list(self)[index] if isinstance(index, slice) else original(self, index)

    nn.ModuleList.__getitem__ = get  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.ModuleList.__getitem__ = original  # type: ignore[method-assign]


def outer_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], gradients: Sequence[Sequence[torch.Tensor]]
) -> None:
    """The mean of the tasks' gradients to the outer optimiser."""
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.stack([own[number] for own in gradients]).sum(dim=0) / len(gradients)
    optimizer.step()
    optimizer.zero_grad()
