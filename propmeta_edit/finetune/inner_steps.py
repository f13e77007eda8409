"""How the inner loop moves θ along a gradient: one short class a rule, each with its equation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import find_whiteners
from propmeta_edit.protocols import LanguageModel


class InnerStep(Protocol):
    """One edit's rule, or that of several edits side by side; it keeps what it needs from step to step."""

    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        """Move the parameters in place.

        Args:
            gradients: ``∂L/∂θ``, one a parameter, in their order and shapes.
        """
        ...


class AdamW:
    """``θ ← AdamW(θ, ∂L/∂θ)`` at rate α, the paper's: in its first steps every number moves by about α, whatever its gradient."""

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], settings: EditSettings) -> None:
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            list(parameters.values()),
            lr=settings.inner_lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        set_gradients(self._parameters, gradients)
        self._optimizer.step()
        set_gradients(self._parameters, [None] * len(self._parameters))


class Whitened:
    """``θ_j ← θ_j − α ‖θ‖ D_j / ‖D‖`` with ``D_j = ∂L/∂θ_j (C_j + λ c_j I)⁻¹``: directions that all texts use are dear.

    C_j is the second moment of what enters the matrix θ_j over ordinary text, c_j the mean of its diagonal, λ ``settings.damping``;
    each norm is one over all matrices of an edit, that of θ as the edit begins. Biases stay. D_j has the rank of the gradient, so
    that an edit's is at most K times its tokens. It is to AdamW what ROME's and AlphaEdit's updates are to fine-tuning.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], settings: EditSettings) -> None:
        matrices = {name: parameter for name, parameter in parameters.items() if name.endswith(".weight")}
        self._matrices = [matrices.get(name) for name in parameters]
        self._whiteners = find_whiteners(model, matrices, settings.damping)
        self._rate = settings.inner_lr * _norms(list(matrices.values()))

    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        moved = [(p, g) for p, g in zip(self._matrices, gradients, strict=True) if p is not None]
        with torch.no_grad():
            steps = [whiten(gradient) for whiten, (_, gradient) in zip(self._whiteners, moved, strict=True)]
            sizes = self._rate / _norms(steps).clamp_min(torch.finfo(torch.float32).tiny)
            for (parameter, _), step in zip(moved, steps, strict=True):
                parameter.sub_(sizes.view(-1, 1, 1) * step if step.dim() == 3 else sizes * step)


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


def set_gradients(parameters: Mapping[str, nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    """Hand gradients to an optimiser, or take them away with None."""
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        if gradient is not None and gradient.stride() != parameter.stride():
            # torch's fused optimisers walk memory and would pair numbers wrongly.
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One norm over all tensors: [N, 1] of N stacked edits' matrices, [] of a single edit's."""
    squares = [tensor.detach().square().sum(dim=(-2, -1)) for tensor in tensors]
    return torch.stack(squares).sum(dim=0).sqrt()
