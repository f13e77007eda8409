"""Exact (second-order) MAML as the tests' oracle: the outer gradient taken through the inner loop, so that it is known what Eq. 4
leaves out.

It keeps the graph of all K steps, so memory grows with K times the model's activations, and it runs one task at a time. What a
training with it was worth is in docs/search.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.metatrain.fomaml import TaskGradients
from propmeta_edit.metatrain.outer_losses import OuterLoss
from propmeta_edit.text.encoding import EncodedBatch


def compute_exact_task_gradients(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    outer_loss: OuterLoss,
    settings: EditSettings,
) -> TaskGradients:
    """``∇_θ L_related(f_{θ_τ(θ)})`` of one task, the inner loop's own derivative included.

    Args:
        target, outer_loss: as for ``fomaml.compute_task_gradients``, of one task.
    """
    holder = _Holder(model)
    names = [f"model.{name}" for name in parameters]
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        theta = [p.detach().clone().requires_grad_() for p in parameters.values()]
        adapted: Sequence[torch.Tensor] = theta
        first = second = [torch.zeros_like(value) for value in theta]
        step, target_loss = 0, None
        for _ in range(settings.num_inner_steps):
            for batch in target:
                step += 1
                given = dict(zip(names, adapted, strict=True))
                loss = functional_call(holder, given, (lambda m, b=batch: compute_answer_loss(m, b, settings.loss_reduction),))
                gradients = torch.autograd.grad(loss.sum(), list(adapted), create_graph=True)
                adapted, first, second = _adamw(adapted, gradients, first, second, step, settings)
                target_loss = loss.detach()
        related = functional_call(holder, dict(zip(names, adapted, strict=True)), (outer_loss,))
        gradients = torch.autograd.grad(related.sum(), theta)
    return TaskGradients(tuple(g.contiguous() for g in gradients), target_loss, related.detach())


class _Holder(nn.Module):
    """A model as a submodule, so that any function of it can be called with other tensors for its parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: OuterLoss) -> torch.Tensor:
        return function(self.model)


Tensors = Sequence[torch.Tensor]


def _adamw(
    values: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, settings: EditSettings
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """torch's AdamW as plain differentiable arithmetic: new values and moments."""
    b1, b2 = settings.beta1, settings.beta2
    first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
    second = [b2 * v + (1 - b2) * g.square() for v, g in zip(second, gradients, strict=True)]
    decay = 1 - settings.inner_lr * settings.weight_decay
    moved = []
    for value, m, v in zip(values, first, second, strict=True):
        # A number that never had a gradient stays, and √v has no derivative at 0.
        is_still = v == 0
        root = torch.where(is_still, torch.ones_like(v), v).sqrt() / (1 - b2**step) ** 0.5
        update = (m / (1 - b1**step)) / (root + settings.eps)
        moved.append(value * decay - settings.inner_lr * torch.where(is_still, torch.zeros_like(update), update))
    return moved, first, second
