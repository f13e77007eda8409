"""The one loss of the method: cross-entropy on answer tokens only (method.md, section 2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from propmeta_edit.text.encoding import IGNORED, EncodedBatch


def compute_answer_loss(model: nn.Module, batch: EncodedBatch, reduction: str = "mean") -> torch.Tensor:
    """``L = -(1/m) Σ_j log p(o_j | c, o_<j)``, averaged over the batch.

    Args:
        model: a causal language model of transformers; run in the mode it is in.
        batch: B texts with labels on their answer tokens, on the model's device.
        reduction: over the m answer tokens of a text, ``mean`` or ``sum``; over texts always the mean.

    Returns:
        Scalar in nats, fp32 or the logits' dtype if that is wider.
    """
    positions = torch.arange(batch.first_label - 1, batch.labels.shape[1] - 1, device=batch.labels.device)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask if batch.is_padded else None,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=positions,
    ).logits
    return reduce_answer_tokens(logits, batch.labels[:, batch.first_label :], reduction)


def reduce_answer_tokens(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of aligned logits [B, T, V] and labels [B, T], per text over its tokens, then the mean over texts."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    token_nll = F.cross_entropy(wide.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    per_text = token_nll.sum(dim=1)
    if reduction == "mean":
        per_text = per_text / (labels != IGNORED).sum(dim=1)
    elif reduction != "sum":
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return per_text.mean()
