"""How the inner loop moves θ along a gradient: one short class a rule, each with its equation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.optim.adamw import adamw

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import find_whiteners
from propmeta_edit.protocols import LanguageModel


class InnerStep(Protocol):
    """One edit's rule, or that of several edits side by side; it keeps what it needs from step to step."""

    def __call__(self, loss: torch.Tensor) -> None:
        """Move the parameters in place along ``∂L/∂θ``, and leave no gradient behind.

        Args:
            loss: L, []; of several edits the sum. What led to it is used up.
        """
        ...


class AdamW:
    """``θ ← AdamW(θ, ∂L/∂θ)`` at rate α, the paper's: in its first steps every number moves by about α, whatever its gradient.

    Each tensor moves as soon as its gradient is there, while the backward pass goes on below it, and the gradient is given up: no
    two are ever held. The numbers are those of a step after the whole pass, which reads no tensor once its gradient is known.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], settings: EditSettings) -> None:
        self._state = {parameter: _AdamWState(parameter) for parameter in parameters.values()}
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

    def __call__(self, loss: torch.Tensor) -> None:
        with ExitStack() as hooks:
            for parameter in self._state:
                parameter.grad = None
                handle = parameter.register_post_accumulate_grad_hook(self._move)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            loss.backward()  # type: ignore[no-untyped-call]

    def _move(self, parameter: torch.Tensor) -> None:
        state, gradients = self._state[parameter], [cast(torch.Tensor, parameter.grad)]  # type: ignore[index]
        with torch.no_grad():
            self._rule([parameter], gradients, [state.mean], [state.square], state_steps=[state.count])
        parameter.grad = None


class _AdamWState:
    """The moments of one parameter, and how often it has moved."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self.count = torch.zeros((), device=parameter.device)


class Whitened:
    """``θ_j ← θ_j − α ‖θ‖ D_j / ‖D‖`` with ``D_j = ∂L/∂θ_j (C_j + λ c_j I)⁻¹``: directions that all texts use are dear.

    C_j is the second moment of what enters the matrix θ_j over ordinary text, c_j the mean of its diagonal, λ ``settings.damping``;
    each norm is one over all matrices of an edit, that of θ as the edit begins. Biases stay. D_j has the rank of the gradient, so
    that an edit's is at most K times its tokens. It is to AdamW what ROME's and AlphaEdit's updates are to fine-tuning.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], settings: EditSettings) -> None:
        matrices = {name: parameter for name, parameter in parameters.items() if name.endswith(".weight")}
        self._matrices = list(matrices.values())
        self._whiteners = find_whiteners(model, matrices, settings.damping)
        self._rate = settings.inner_lr * _norms(self._matrices)

    def __call__(self, loss: torch.Tensor) -> None:
        gradients = torch.autograd.grad(loss, self._matrices)
        with torch.no_grad():
            steps = [whiten(gradient) for whiten, gradient in zip(self._whiteners, gradients, strict=True)]
            sizes = self._rate / _norms(steps).clamp_min(torch.finfo(torch.float32).tiny)
            for parameter, step in zip(self._matrices, steps, strict=True):
                size = sizes.to(step.device)
                parameter.sub_(size.view(-1, 1, 1) * step if step.dim() == 3 else size * step)


STEPS: Mapping[str, Any] = {"adamw": AdamW, "whitened": Whitened}


def make_step(model: LanguageModel, parameters: Mapping[str, nn.Parameter], settings: EditSettings) -> InnerStep:
    """A new step of the kind that the settings name.

    Args:
        parameters: the model's own, or stacked copies of several edits, [N, in, out] each.

    Raises:
        ModelError: the step needs second moments, and the model was given none for one of its matrices.
    """
    step: InnerStep = STEPS[settings.inner_step](model, parameters, settings)
    return step


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One norm over all tensors: [N, 1] of N stacked edits' matrices, [] of a single edit's."""
    squares = [tensor.detach().square().sum(dim=(-2, -1)).to(tensors[0].device) for tensor in tensors]
    return torch.stack(squares).sum(dim=0).sqrt()
