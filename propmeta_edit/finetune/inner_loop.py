"""THE inner loop: plain fine-tuning on the target fact. Meta-training and editing both call it and nothing else.

Eq. 2 of the paper, ``θ_τ = θ − α ∇_θ L_target(f_θ)``, K times, with AdamW, or another of ``finetune.inner_steps``, in place of SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_steps import inner_step
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.low_rank import LowRankChanges
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.models.packed import packed_products
from propmeta_edit.models.states import tf32_products
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


def apply_inner_loop(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    settings: EditSettings,
    num_edits: int = 1,
    changes: LowRankChanges | None = None,
) -> list[torch.Tensor]:
    """Move ``parameters`` in place from θ to θ_τ (Eq. 2); call it under ``only_trainable``.

    One new step rule serves the whole call: K passes over the batches of ``target``, one update a batch.

    Args:
        parameters: the model's own, or the stacked copies of ``num_edits`` independent edits (``finetune.stacking``).
        changes: what a step of low rank adds to, standing in the model; θ is then left alone.
        target: the facts; with several edits, each batch holds as many texts of every edit, those of an edit side by side.

    Returns:
        The loss of each edit before each update, [N], detached (reading them is left to the caller: it waits for the device).
    """
    losses: list[torch.Tensor] = []
    if not settings.num_inner_steps:
        return losses
    prefix = FrozenPrefix(model, parameters)
    num_updates = settings.num_inner_steps * len(target)
    with (
        packed_products(model, parameters),
        tf32_products(settings.tf32),
        inner_step(model, parameters, settings, num_updates, changes) as step,
    ):
        states = [prefix.compute_states(batch) for batch in target]
        for _ in range(settings.num_inner_steps):
            for batch, state in zip(target, states, strict=True):
                with prefix.skipped(state):
                    loss = compute_answer_loss(model, batch, settings.loss_reduction, num_edits)
                losses.append(loss.detach())
                step(loss.sum(), batch)
    return losses
