"""How the inner loop moves θ along a gradient: one short class a rule, each with its equation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import nn
from torch.optim.adamw import adamw

from propmeta_edit.finetune.buffers import buffer
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.low_rank import LowRankChanges
from propmeta_edit.finetune.writes import Writes, gradients_of, seen_writes
from propmeta_edit.finetune.written_inputs import standing_whiteners
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


class InnerStep(Protocol):
    """One edit's rule, or that of several edits side by side; it keeps what it needs from step to step."""

    def __call__(self, loss: torch.Tensor, batch: EncodedBatch) -> None:
        """Move the parameters in place along ``∂L/∂θ``, and leave no gradient behind.

        Args:
            loss: L, []; of several edits the sum. What led to it is used up.
            batch: the texts that it is of, which say at which tokens the step writes.
        """
        ...


class AdamW:
    """``θ ← AdamW(θ, ∂L/∂θ)`` at rate α, the paper's: in its first steps every number moves by about α, whatever its gradient.

    Each tensor moves as soon as its gradient is there, while the backward pass goes on below it, and the gradient is given up: no
    two are ever held. The numbers are those of a step after the whole pass, which reads no tensor once its gradient is known.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: EditSettings, writes: Writes | None = None) -> None:
        self._parameters, self._writes = parameters, writes
        self._state = {parameter: _AdamWState(name, parameter) for name, parameter in parameters.items()}
        self._rule = partial(
            adamw,
            max_exp_avg_sqs=[],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=settings.inner_lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def __call__(self, loss: torch.Tensor, batch: EncodedBatch) -> None:
        if self._writes is not None:
            written = self._writes.take(loss, batch, next(iter(self._state)).dtype)
            for name, gradient in gradients_of(written, self._parameters):
                self._move(self._parameters[name], gradient)
            return
        with ExitStack() as hooks:
            for parameter in self._state:
                parameter.grad = None
                handle = parameter.register_post_accumulate_grad_hook(self._move_along)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            loss.backward()  # type: ignore[no-untyped-call]

    def _move_along(self, parameter: torch.Tensor) -> None:
        self._move(parameter, cast(torch.Tensor, parameter.grad))
        parameter.grad = None

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        state = self._state[parameter]  # type: ignore[index]
        with torch.no_grad():
            self._rule([parameter], [gradient], [state.mean], [state.square], state_steps=[state.count])


class _AdamWState:
    """The moments of one parameter, and how often it has moved."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.mean, self.square = (buffer(f"{which} of {name}", parameter.detach()).zero_() for which in ("mean", "square"))
        self.count = torch.zeros((), device=parameter.device)


class Whitened:
    """``W ← W − α_s ‖θ‖ D / ‖D‖``, ``D = Σ δ (C⁻¹ x)ᵀ``: directions that all texts use are dear. Each fact has its own step.

    C is the second moment of what enters the matrix over ordinary text, and at the tokens of edits that stand in the model
    (``finetune.written_inputs``), its diagonal raised by λ (``settings.damping``) times its
    mean; each norm is one over all matrices, that of D one fact's. α_s falls linearly from 2α to 0. Biases stay. The changes are
    kept as factors (``finetune.low_rank``), of a rank of at most K times the tokens written at. It is to AdamW what ROME's and
    AlphaEdit's updates are to fine-tuning.
    """

    def __init__(
        self, changes: LowRankChanges, whiteners: Mapping[str, torch.Tensor], rates: Iterator[float], writes: Writes
    ) -> None:
        self._changes, self._whiteners, self._rates, self._writes = changes, whiteners, rates, writes
        self._norm = _norm([changes.parameters[f"{path}.weight"] for path in whiteners])

    def __call__(self, loss: torch.Tensor, batch: EncodedBatch) -> None:
        found = self._writes.take(loss, batch, self._norm.dtype)
        with torch.no_grad():
            for path, write in found.items():
                self._changes.note_inputs(path, id(batch), write.inputs)
            writes = {path: replace(found[path], inputs=found[path].inputs @ inverse) for path, inverse in self._whiteners.items()}
            squares = torch.stack([write.squares().to(self._norm.device) for write in writes.values()]).sum(dim=0)
            sizes = next(self._rates) * self._norm / squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # [R]
            for path, write in writes.items():
                self._changes.add(path, write.inputs, -sizes.to(write.deltas.device)[:, None, None] * write.deltas)


@contextmanager
def inner_step(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    settings: EditSettings,
    num_updates: int,
    changes: LowRankChanges | None = None,
) -> Iterator[InnerStep]:
    """A new step of the kind that the settings name, inside which the losses are to be computed.

    Args:
        parameters: the model's own, or stacked copies of several edits, [N, in, out] each.
        num_updates: how often it will be called.
        changes: what a step of low rank adds to, in place of parameters.

    Raises:
        ModelError: the step needs second moments, and the model was given none for one of its matrices.
    """
    if changes is not None:
        whiteners = standing_whiteners(model, parameters, settings.damping)
        rates = (2 * settings.inner_lr * (1 - update / num_updates) for update in range(num_updates))
        with seen_writes(model, parameters) as writes:
            yield Whitened(changes, whiteners, rates, writes)
    elif settings.positions == "all":
        yield AdamW(parameters, settings)
    else:
        with seen_writes(model, parameters) as writes:
            yield AdamW(parameters, settings, writes)


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One norm over all tensors, []."""
    return torch.stack([tensor.detach().square().sum().to(tensors[0].device) for tensor in tensors]).sum().sqrt()
