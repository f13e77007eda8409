"""First-order MAML over (target fact, related question) pairs: Eq. 1-4 of the paper on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from propmeta_edit.finetune.inner_loop import InnerLoopSettings, apply_inner_loop, set_gradients
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import restored_on_exit
from propmeta_edit.text.encoding import EncodedBatch


@dataclass(frozen=True)
class TaskGradient:
    """What one task contributes to the outer step.

    Attributes:
        gradients: ∇_{θ_τ} L_related, one tensor a trained parameter, in their order.
        target_loss: L_target after the last inner update but one (what the inner loop last saw); None without inner steps.
        related_loss: L_related at θ_τ.
    """

    gradients: tuple[torch.Tensor, ...]
    target_loss: torch.Tensor | None
    related_loss: torch.Tensor


def compute_task_gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    related: EncodedBatch,
    inner: InnerLoopSettings,
) -> TaskGradient:
    """Eq. 2 and 4: learn the target, then take the related loss's gradient *at the adapted weights*.

    ``∇_θ L_related(f_{θ_τ}) ≈ ∇_{θ_τ} L_related(f_{θ_τ})``. On exit the parameters are back at θ, to the bit.
    """
    with restored_on_exit(parameters):
        losses = apply_inner_loop(model, parameters, target, inner)  # Eq. 2: θ -> θ_τ
        related_loss = compute_answer_loss(model, related, inner.loss_reduction)
        gradients = torch.autograd.grad(related_loss, list(parameters.values()))  # Eq. 4
    return TaskGradient(gradients, losses[-1] if losses else None, related_loss.detach())


def apply_outer_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tasks: Sequence[TaskGradient]
) -> None:
    """Eq. 3: ``θ ← θ − β ∇_θ L_related(f_{θ_τ})``, AdamW for SGD, the gradient averaged over the tasks of the step."""
    columns = zip(*(task.gradients for task in tasks), strict=True)
    set_gradients(parameters, [torch.stack(column).mean(dim=0) if len(column) > 1 else column[0] for column in columns])
    optimizer.step()
    set_gradients(parameters, [None] * len(parameters))
