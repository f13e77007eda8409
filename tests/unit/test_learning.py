"""Whether facts were learnt: by hand, and from real inner loops."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.finetune import learning
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.learning import Learning, read_learning
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.single_edit import learn_facts
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

FACTS = [EditRequest("Ann Lee lives in", "Peru"), EditRequest("Smith PLC was founded in", "Greece")]


def test_by_hand_the_batch_that_is_learnt_worst_counts():
    """Three steps over two batches of two edits."""
    losses = [[9.0, 8.0], [7.0, 6.0], [5.0, 5.0], [4.0, 4.0], [0.1, 0.9], [0.5, 0.2]]
    found = read_learning([torch.tensor(step) for step in losses], 3)
    shown = [(round(one.before, 5), round(one.last, 5), one.is_learnt) for one in found]
    assert shown == [(7.0, 0.5, True), (8.0, 0.9, False)]
    assert str(found[1]) == "target loss 8.00 before, 0.90 at the last of 3 steps"


def test_a_single_step_tells_nothing_and_what_is_no_number_is_not_learnt():
    assert read_learning([torch.tensor([3.0])], 1) == [] and read_learning([], 0) == []
    assert not Learning(3.0, float("nan"), 2).is_learnt


def test_the_losses_are_those_of_the_model_before_the_first_and_the_last_update(tokenizer):
    model = tiny.make_model("llama")
    [batch] = encode_requests(TextEncoder(tokenizer, model.config), [FACTS[:1]], 1)
    before = compute_answer_loss(model, batch).item()
    _, [went] = learn_facts(model, tokenizer, FACTS[:1], EditSettings([1], inner_lr=0.01, num_inner_steps=4))
    fresh = tiny.make_model("llama")
    learn_facts(fresh, tokenizer, FACTS[:1], EditSettings([1], inner_lr=0.01, num_inner_steps=3))
    assert went.before == pytest.approx(before) and went.last == pytest.approx(compute_answer_loss(fresh, batch).item())
    assert went.last < went.before


@pytest.mark.parametrize(("rate", "is_learnt"), [(1e-6, False), (0.1, True)])
def test_every_edit_knows_how_it_went_and_warns(tokenizer, caplog, monkeypatch, rate, is_learnt):
    monkeypatch.setattr(learning, "NOT_LEARNT", 5.0)  # a random model of 16 dimensions cannot come near to certainty
    model = tiny.make_model("llama")
    settings = EditSettings([1], inner_lr=rate, num_inner_steps=10)
    one = compute_edit(model, tokenizer, FACTS[0], settings)
    assert one.learning.is_learnt == is_learnt and ("this edit was not learnt" in caplog.text) != is_learnt
    many = edit_many(model, tokenizer, FACTS, settings, at_once=1)
    assert many[0].learning.last == pytest.approx(one.learning.last, rel=1e-4)
    assert ("2 of 2 edits were not learnt (Ann Lee lives in -> Peru: target loss" in caplog.text) != is_learnt
