"""The answer-only loss: closed forms, and independence of padding."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from propmeta_edit.finetune import losses
from propmeta_edit.finetune.losses import compute_answer_loss, reduce_answer_tokens
from propmeta_edit.text.encoding import IGNORED, EncodedBatch, collate, encode_answer

TEXTS = [("Ann Lee is a citizen of", "Peru"), ("The capital of France is", "Paris in Greece"), ("Lima", "Spanish")]


def test_mean_and_sum_by_hand():
    """Two texts with one and two answer tokens whose probabilities are written down."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [5, 6, IGNORED, 8]])  # nothing predicts the first token, labelled or not
    batch = EncodedBatch(ids, torch.ones_like(ids), ids, labels, is_padded=False)
    assert batch.scored.tolist() == [[0, 1, 1], [2, 1, 3]]
    nll = torch.tensor([-math.log(0.1), -math.log(0.2), -math.log(0.75)], dtype=torch.float64)
    assert reduce_answer_tokens(nll, batch).tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item() / 2], rel=1e-12)
    assert reduce_answer_tokens(nll, batch, "sum").tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item()])
    with pytest.raises(ValueError, match="median"):
        reduce_answer_tokens(nll, batch, "median")


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


def test_the_loss_does_not_wait_for_the_device(family, tokenizer, monkeypatch):
    """Tensors without contents can be computed with only where no number has to be read to know a shape.

    The model's body is left out: transformers looks at masks and positions itself, once a forward.
    """
    model = tiny.make_model(family).to("meta")
    batch = collate(tokenizer, [encode_answer(tokenizer, *text) for text in TEXTS[:2]]).to("meta")
    hidden = torch.zeros(*batch.input_ids.shape, model.config.hidden_size, dtype=torch.float64, device="meta", requires_grad=True)
    monkeypatch.setattr(losses, "compute_hidden_states", lambda model, batch: hidden)
    loss = compute_answer_loss(model, batch, num_edits=2)
    [gradient] = torch.autograd.grad(loss.sum(), [hidden])
    assert loss.shape == (2,) and loss.is_meta and gradient.shape == hidden.shape
    with pytest.raises((NotImplementedError, RuntimeError)):
        batch.labels[batch.labels != IGNORED]  # what would wait
