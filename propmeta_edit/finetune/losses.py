"""The one loss of the method: cross-entropy on answer tokens only (method.md, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from propmeta_edit.models.forwards import compute_hidden_states
from propmeta_edit.text.encoding import IGNORED, EncodedBatch


def compute_answer_loss(model: Any, batch: EncodedBatch, reduction: str = "mean", num_edits: int = 1) -> torch.Tensor:
    """``L = -(1/m) Σ_j log p(o_j | c, o_<j)``, averaged over the texts of an edit.

    Args:
        model: a causal language model of transformers; run in the mode it is in.
        batch: N·B texts with labels on their answer tokens, on the model's device; the B texts of an edit are neighbours.
        reduction: over the m answer tokens of a text, ``mean`` or ``sum``; over the texts of an edit always the mean.
        num_edits: N, how many edits the batch holds (``finetune.stacking``); they do not see each other.

    Returns:
        [N] in nats, fp32 or the logits' dtype if that is wider.
    """
    logits, is_scored = compute_answer_logits(model, batch)
    token_nll = F.cross_entropy(logits, batch.labels[:, 1:][is_scored], reduction="none")
    return reduce_answer_tokens(token_nll, is_scored, reduction).view(num_edits, -1).mean(dim=1)


def compute_answer_logits(model: Any, batch: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where an answer token is predicted, and nowhere else.

    Returns:
        (logits [M, vocabulary] of all M answer tokens, fp32 or wider; which tokens they are: [B, T - 1] with M times True).
    """
    is_scored = batch.labels[:, 1:] != IGNORED
    hidden = compute_hidden_states(model, batch)
    logits = model.get_output_embeddings()(hidden[:, :-1][is_scored])  # the head only there
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, is_scored


def reduce_answer_tokens(token_nll: torch.Tensor, is_scored: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """One number a text from the losses of all answer tokens.

    Args:
        token_nll: one loss for each True of ``is_scored``, in its order.
        is_scored: [B, T], which tokens of which text are the answer's.
        reduction: ``mean`` or ``sum`` over a text's answer tokens.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    text_of_token = is_scored.nonzero()[:, 0]
    per_text = token_nll.new_zeros(len(is_scored)).index_add(0, text_of_token, token_nll)
    return per_text / is_scored.sum(dim=1) if reduction == "mean" else per_text
