"""Edits side by side: the same weights and answers as one after another, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable, restored_on_exit
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import cast_around, get_blocks, select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

EDITS = [
    [EditRequest("Smith Innovation PLC was founded in", "Greece"), EditRequest("Ann Lee speaks", "Spanish")],
    [EditRequest("Ann Lee is a citizen of", "Peru"), EditRequest("The capital of France is", "Paris in Greece")],
    [EditRequest("Lima is", "Spanish"), EditRequest("Greece uses", "euro")],
]
PROMPTS = ["Question: What is the currency of the country? Answer: The answer is", "Ann Lee is"]
SETTINGS = EditSettings([1], inner_lr=0.05, num_inner_steps=3)


def test_edits_at_once_answer_as_one_by_one(family, tokenizer):
    model = tiny.make_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = select_parameters(model, [1])
    unedited = generate_greedily(model, tokenizer, PROMPTS)
    one_by_one = []
    for edits in EDITS:
        with restored_on_exit(parameters):
            with only_trainable(model, parameters):
                apply_inner_loop(model, parameters, encode_requests(TextEncoder(tokenizer), [edits]), SETTINGS)
            one_by_one += generate_greedily(model, tokenizer, PROMPTS)
    with many_edits(model, tokenizer, EDITS, SETTINGS):
        at_once = generate_greedily(model, tokenizer, PROMPTS * len(EDITS))
    assert at_once == one_by_one and len(set(one_by_one)) > len(PROMPTS), "the edits must differ for this to mean anything"
    assert generate_greedily(model, tokenizer, PROMPTS) == unedited
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())


def test_a_failure_inside_leaves_the_model_as_it_was(family, tokenizer):
    model = tiny.make_model(family)
    before = generate_greedily(model, tokenizer, PROMPTS)
    with pytest.raises(ValueError, match="mine"), many_edits(model, tokenizer, EDITS, replace(SETTINGS, layers=[0])):
        raise ValueError("mine")
    assert generate_greedily(model, tokenizer, PROMPTS) == before


def test_stacked_weights_compute_in_their_own_dtype(family):
    """fp32 copies inside a half-precision model, as the casting projections do it."""
    model = tiny.make_model(family, dtype=torch.bfloat16)
    for name, parameter in select_parameters(model, [1]).items():
        parameter.data = parameter.data.float()
        cast_around(model.get_submodule(name.rpartition(".")[0]))
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        plain = model(ids).logits
        with stacked_weights(model, select_parameters(model, [1]), 3) as stack:
            assert all(copy.dtype == torch.float32 and len(copy) == 3 for copy in stack.parameters.values())
            torch.testing.assert_close(model(ids).logits, plain, rtol=0.02, atol=0.02)


def test_states_below_the_edited_layer_stand_for_the_text(family, tokenizer):
    """With padding in the batch; the loss and its gradient are the whole model's, and the model is whole again afterwards."""
    model = tiny.make_model(family)
    parameters = select_parameters(model, [2])
    [batch, _] = encode_requests(TextEncoder(tokenizer), EDITS)
    assert 0 in batch.input_ids[:, -1], "padded"
    with only_trainable(model, parameters):
        plain = compute_answer_loss(model, batch, num_edits=3)
        expected = torch.autograd.grad(plain.sum(), list(parameters.values()))
        prefix = FrozenPrefix(model, parameters)
        states = prefix.compute_states(batch)
        hidden = states[0] if isinstance(states, tuple) else states  # of GPT-2 in transformers 5.0
        assert not hidden.requires_grad and hidden.shape[:2] == batch.input_ids.shape
        with prefix.skipped(states):
            loss = compute_answer_loss(model, batch, num_edits=3)
        gradients = torch.autograd.grad(loss.sum(), list(parameters.values()))
        again = compute_answer_loss(model, batch, num_edits=3)
    assert torch.equal(loss, plain) and torch.equal(again, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert FrozenPrefix(model, select_parameters(model, [0])).compute_states(batch) is None


def test_hooks_of_layers_that_are_left_out_stay_still(tokenizer):
    """A hook may be what fetches a layer's weights from other devices."""
    model = tiny.make_model("llama")
    blocks, seen = get_blocks(model), []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, inputs, number=number: seen.append(number))
    [batch, _] = encode_requests(TextEncoder(tokenizer), EDITS)
    prefix = FrozenPrefix(model, select_parameters(model, [2]))
    states = prefix.compute_states(batch)
    assert seen == [0, 1]
    with prefix.skipped(states):
        compute_answer_loss(model, batch)
    assert seen == [0, 1, 2] and get_blocks(model) == blocks


def test_edits_of_half_precision_tensors_are_refused(tokenizer):
    model = tiny.make_model("llama", dtype=torch.bfloat16)
    with (
        pytest.raises(ModelError, match=r"must be fp32, but model\.layers\.1\..* is torch\.bfloat16.*load_model with layers="),
        many_edits(model, tokenizer, EDITS, SETTINGS),
    ):
        pass
