"""The answer-only loss: closed forms, and independence of padding."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from propmeta_edit.finetune.losses import compute_answer_loss, reduce_answer_tokens
from propmeta_edit.text.encoding import IGNORED, collate, encode_answer

TEXTS = [("Ann Lee is a citizen of", "Peru"), ("The capital of France is", "Paris in Greece"), ("Lima", "Spanish")]


def test_mean_and_sum_by_hand():
    """Two texts with one and two answer tokens whose probabilities are written down."""
    is_scored = torch.tensor([[False, True, False], [True, False, True]])
    nll = torch.tensor([-math.log(0.1), -math.log(0.2), -math.log(0.75)], dtype=torch.float64)
    assert reduce_answer_tokens(nll, is_scored).tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item() / 2], rel=1e-12)
    assert reduce_answer_tokens(nll, is_scored, "sum").tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item()])
    with pytest.raises(ValueError, match="median"):
        reduce_answer_tokens(nll, is_scored, "median")


def test_loss_equals_the_obvious_one(family, tokenizer):
    """Against log-softmax of the whole model's logits, read position by position."""
    model = tiny.make_model(family)
    ids, labels = encode_answer(tokenizer, *TEXTS[1])
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        terms = [-logp[i - 1, token].item() for i, token in enumerate(labels) if token != IGNORED]
        loss = compute_answer_loss(model, collate(tokenizer, [(ids, labels)]))
    assert len(terms) > 1
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mean_is_mean_of_singles_under_either_padding(family, tokenizer, side):
    model = tiny.make_model(family)
    encoded = [encode_answer(tokenizer, *text) for text in TEXTS]
    assert len({len(ids) for ids, _ in encoded}) == 3
    with torch.no_grad():
        singles = [compute_answer_loss(model, collate(tokenizer, [one])).item() for one in encoded]
        together = compute_answer_loss(model, collate(tokenizer, encoded, side)).item()
    assert together == pytest.approx(sum(singles) / 3, rel=1e-9)


def test_each_edit_has_the_mean_over_its_own_texts(tokenizer):
    model = tiny.make_model("llama")
    encoded = [encode_answer(tokenizer, *text) for text in (*TEXTS, TEXTS[0])]
    with torch.no_grad():
        singles = [compute_answer_loss(model, collate(tokenizer, [one])).item() for one in encoded]
        loss = compute_answer_loss(model, collate(tokenizer, encoded), num_edits=2)
    assert loss.tolist() == pytest.approx([sum(singles[:2]) / 2, sum(singles[2:]) / 2], rel=1e-9)
