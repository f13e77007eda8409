"""THE inner loop: plain fine-tuning on the target fact. Meta-training and editing both call it and nothing else.

Eq. 2 of the paper, ``θ_τ = θ − α ∇_θ L_target(f_θ)``, K times, with AdamW in place of SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.packed import packed_products
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.text.encoding import EncodedBatch


@dataclass(frozen=True)
class InnerLoopSettings:
    """Settings of Eq. 2.

    Args:
        inner_lr: α. The paper's 2e-5 is for models of 1B to 8B; smaller models need more.
        num_inner_steps: K, passes over the target facts; always exactly K, no early stop.
        weight_decay, beta1, beta2, eps: AdamW's, torch's defaults.
        loss_reduction: over answer tokens, ``mean`` or ``sum``.
    """

    inner_lr: float = 2e-5
    num_inner_steps: int = 10
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.inner_lr < 0:
            raise ConfigError(f"the inner learning rate must be 0 or more, got {self.inner_lr}")
        if self.num_inner_steps < 0:
            raise ConfigError(f"the number of inner steps must be 0 or more, got {self.num_inner_steps}")
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction must be mean or sum, got {self.loss_reduction!r}")


def apply_inner_loop(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    settings: InnerLoopSettings,
    num_edits: int = 1,
) -> list[torch.Tensor]:
    """Move ``parameters`` in place from θ to θ_τ (Eq. 2); call it under ``only_trainable``.

    One new optimiser serves the whole call: K passes over the batches of ``target``, one update a batch.

    Args:
        parameters: the model's own, or the stacked copies of ``num_edits`` independent edits (``finetune.stacking``).
        target: the facts; with several edits, each batch holds as many texts of every edit, those of an edit side by side.

    Returns:
        The loss of each edit before each update, [N], detached (reading them is left to the caller: it waits for the device).
    """
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.inner_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    losses: list[torch.Tensor] = []
    if not settings.num_inner_steps:
        return losses
    prefix = FrozenPrefix(model, parameters)
    with packed_products(model, parameters):
        states = [prefix.compute_states(batch) for batch in target]
        for _ in range(settings.num_inner_steps):
            for batch, state in zip(target, states, strict=True):
                with prefix.skipped(state):
                    loss = compute_answer_loss(model, batch, settings.loss_reduction, num_edits)
                set_gradients(parameters, torch.autograd.grad(loss.sum(), list(parameters.values())))
                optimizer.step()
                losses.append(loss.detach())
    set_gradients(parameters, [None] * len(parameters))
    return losses


def set_gradients(parameters: Mapping[str, nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    """Hand gradients to an optimiser, or take them away with None."""
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        if gradient is not None and gradient.stride() != parameter.stride():
            # torch's fused optimisers walk memory and would pair numbers wrongly.
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
