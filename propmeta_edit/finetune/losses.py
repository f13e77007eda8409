"""The one loss of the method: cross-entropy on answer tokens only."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from propmeta_edit.models.forwards import compute_logits_after
from propmeta_edit.models.frozen_blocks import tokens_read
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


def compute_answer_loss(model: LanguageModel, batch: EncodedBatch, reduction: str = "mean", num_edits: int = 1) -> torch.Tensor:
    """``L = -(1/m) Σ_j log p(o_j | c, o_<j)``, averaged over the texts of an edit.

    Args:
        model: a causal language model of transformers; run in the mode it is in.
        batch: N·B texts with labels on their answer tokens, on the model's device; the B texts of an edit are neighbours.
        reduction: over the m answer tokens of a text, ``mean`` or ``sum``; over the texts of an edit always the mean.
        num_edits: N, how many edits the batch holds (``finetune.stacking``); they do not see each other.

    Returns:
        [N] in nats, fp32 or the logits' dtype if that is wider.
    """
    token_nll = compute_token_losses(model, batch)
    return reduce_answer_tokens(token_nll, batch, reduction).view(num_edits, -1).mean(dim=1)


def compute_token_losses(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor:
    """``-log p`` of each of the M answer tokens, [M], in the order of ``batch.scored``."""
    texts, positions = batch.scored
    logits = compute_answer_logits(model, batch)
    return F.cross_entropy(logits, batch.labels[texts, positions].to(logits.device), reduction="none")


def compute_answer_logits(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor:
    """Logits where an answer token is predicted, and nowhere else: [M, vocabulary], fp32 or wider."""
    texts, positions = batch.scored
    with tokens_read(batch.read):
        logits = compute_logits_after(model, batch, texts, positions - 1)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def reduce_answer_tokens(token_losses: torch.Tensor, batch: EncodedBatch, reduction: str = "mean") -> torch.Tensor:
    """One number a text, [B], from the losses of all answer tokens.

    Args:
        token_losses: [M], in the order of ``batch.scored``.
        reduction: ``mean`` or ``sum`` over a text's answer tokens.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    device = token_losses.device  # the head's, where a model is spread over several
    texts, positions = batch.scored.to(device)
    # Each loss has a place of its own: sums into a common one would come in any order on a GPU, with another last bit each time.
    per_text = token_losses.new_zeros(batch.labels.shape).index_put((texts, positions), token_losses).sum(dim=1)
    return per_text / batch.answer_lengths.to(device) if reduction == "mean" else per_text
