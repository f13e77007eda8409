"""First-order MAML over (target fact, related question) pairs: Eq. 1-4 of the paper on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from propmeta_edit.finetune.adapted import adapted_copies
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.metatrain.outer_losses import OuterLoss
from propmeta_edit.metatrain.processes import ALONE, Processes
from propmeta_edit.models.packed import packed_products
from propmeta_edit.models.states import tf32_products
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


@dataclass(frozen=True)
class TaskGradients:
    """What N tasks contribute to the outer step.

    Attributes:
        gradients: Σ_τ ∇_{θ_τ} L_related, one tensor a trained parameter, in their order.
        target_losses: [N], L_target before the last inner update (what the inner loop last saw); None without inner steps.
        related_losses: [N], L_related at each task's own θ_τ.
        first_losses: [N], L_target of the same facts as in ``target_losses``, when the inner loop saw them first.
    """

    gradients: tuple[torch.Tensor, ...]
    target_losses: torch.Tensor | None
    related_losses: torch.Tensor
    first_losses: torch.Tensor | None = None

    def take_in(self, others: TaskGradients) -> TaskGradients:
        """What both contribute. The others' gradients are added to these in place, so that only one sum is ever held."""
        for total, more in zip(self.gradients, others.gradients, strict=True):
            total.add_(more)
        related = torch.cat([self.related_losses, others.related_losses])
        last, first = _join(self.target_losses, others.target_losses), _join(self.first_losses, others.first_losses)
        return TaskGradients(self.gradients, last, related, first)


def _join(own: torch.Tensor | None, others: torch.Tensor | None) -> torch.Tensor | None:
    return None if own is None or others is None else torch.cat([own, others])


def compute_task_gradients(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    outer_loss: OuterLoss,
    settings: EditSettings,
    num_tasks: int = 1,
) -> TaskGradients:
    """Eq. 2 and 4: learn the target, then take the related loss's gradient *at the adapted weights*.

    ``∇_θ L_related(f_{θ_τ}) ≈ ∇_{θ_τ} L_related(f_{θ_τ})``. Each of the N tasks has its own θ_τ; θ itself is never written.

    Args:
        target: batches of N target facts, task by task.
        outer_loss: L_related of the N tasks, [N], made at θ (``metatrain.outer_losses``) and called at θ_τ.
    """
    with (
        packed_products(model, parameters),
        tf32_products(settings.tf32),
        adapted_copies(model, parameters, target, settings, num_tasks) as (adapted, losses),  # Eq. 2: θ -> θ_τ
    ):
        related_losses = outer_loss(model)
        gradients = torch.autograd.grad(related_losses.sum(), list(adapted.parameters.values()))  # Eq. 4
    last, first = (losses[-1], losses[len(target) - 1]) if losses else (None, None)
    return TaskGradients(adapted.sum_over_edits(gradients), last, related_losses.detach(), first)


def apply_outer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tasks: TaskGradients | None,
    processes: Processes = ALONE,
) -> None:
    """Eq. 3: ``θ ← θ − β ∇_θ L_related(f_{θ_τ})``, AdamW for SGD, the gradient averaged over all tasks of the step.

    Args:
        tasks: this process's own, whose gradients become the mean over all; None if the last step has fewer tasks than there are
            processes.

    Raises:
        FloatingPointError: a gradient that is not finite; θ and the optimiser are as they were.
    """
    num_tasks = sum(processes.join([len(tasks.related_losses) if tasks else 0]))
    sums = tasks.gradients if tasks else [torch.zeros_like(p) for p in parameters.values()]
    processes.add_up(sums)
    if not torch.stack([total.isfinite().all().to(sums[0].device) for total in sums]).all():
        raise FloatingPointError("the outer gradient is not finite")
    for parameter, total in zip(parameters.values(), sums, strict=True):
        gradient = total.div_(num_tasks)
        # torch's fused optimisers walk memory and would pair numbers of differently laid out tensors wrongly.
        is_alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if is_alike else torch.empty_like(parameter).copy_(gradient)
    optimizer.step()
    optimizer.zero_grad()
