"""The engine against the plain loops of ``propmeta_edit/speed/reference.py``: the same weights, losses and outer steps."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.weights import only_trainable, snapshot
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.metatrain.task_texts import encode_step
from propmeta_edit.metatrain.trainer import compute_step_gradients
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question
from propmeta_edit.speed import reference
from propmeta_edit.text.encoding import TextEncoder, encode_requests

TASKS = [
    MetaTask("a", EditRequest("Smith Innovation PLC was founded in", "Greece"), Question("What is its currency?", ("euro",))),
    MetaTask("b", EditRequest("Ann Lee lives in", "Peru"), Question("What does Ann Lee pay with every day?", ("sol",))),
    MetaTask("c", EditRequest("The capital is", "Lima"), Question("Where?", ("Lima in Peru",))),
]


def test_an_edit_of_several_facts(family, tokenizer):
    requests = [task.target for task in TASKS]
    settings = EditSettings(inner_lr=0.01, num_inner_steps=3, weight_decay=0.1)
    plain, engine = tiny.make_model(family), tiny.make_model(family)
    expected, parameters = select_parameters(plain, [1]), select_parameters(engine, [1])
    with only_trainable(plain, expected):
        reference.edit(plain, tokenizer, expected, requests, settings)
    with only_trainable(engine, parameters):
        apply_inner_loop(engine, parameters, encode_requests(TextEncoder(tokenizer), [requests]), settings)
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, expected[name].data, rtol=1e-5, atol=1e-7, msg=name)


def test_one_task_by_higher(family, tokenizer):
    """Other people's code for the same gradient; its Adam has no decoupled weight decay."""
    settings = EditSettings(inner_lr=0.01, num_inner_steps=3, weight_decay=0.0)
    model = tiny.make_model(family)
    parameters = select_parameters(model, [1])
    with only_trainable(model, parameters):
        expected, expected_loss = reference.task_gradients_by_higher(model, tokenizer, parameters, TASKS[0], settings)
        gradients, loss = reference.task_gradients(model, tokenizer, parameters, TASKS[0], settings)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    assert max(float(g.abs().max()) for g in gradients) > 0.05, "the tolerance is small against the gradients"


@pytest.mark.parametrize("at_once", [1, 3])
def test_two_outer_steps(family, tokenizer, at_once):
    """All tasks in each step, one after another and side by side."""
    config = MetaTrainConfig(
        model="tiny", layers=[1], inner_lr=0.01, num_inner_steps=2, outer_lr=0.01, tasks_per_step=3, tasks_at_once=at_once
    )
    plain, engine = tiny.make_model(family), tiny.make_model(family)
    expected, parameters = select_parameters(plain, [1]), select_parameters(engine, [1])
    first, second = (torch.optim.AdamW(p.values(), lr=0.01, weight_decay=0.01) for p in (expected, parameters))
    before = snapshot(parameters)
    for _ in range(2):
        with only_trainable(plain, expected):
            own = [reference.task_gradients(plain, tokenizer, expected, task, config.edit) for task in TASKS]
        reference.outer_step(first, expected, [gradients for gradients, _ in own])
        with only_trainable(engine, parameters):
            gradients = compute_step_gradients(engine, parameters, encode_step(TextEncoder(tokenizer), TASKS, config), config)
        apply_outer_step(second, parameters, gradients)
        torch.testing.assert_close(
            gradients.related_losses.double(), torch.tensor([loss for _, loss in own]).double(), rtol=1e-4, atol=1e-5
        )
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, expected[name].data, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(p.data, before[name])
