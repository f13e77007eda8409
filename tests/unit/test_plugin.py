"""The apply function by itself: what it promises EasyEdit, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from propmeta_edit import MetaFTHyperParams, apply_metaft_to_model
from propmeta_edit.errors import ModelError, RequestError
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.models.devices import is_out_of_memory
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

REQUEST = {"prompt": "Ann Lee is a citizen of", "target_new": "Peru", "subject": "Ann Lee", "ground_truth": None}
OTHER = {"prompt": "The capital of France is", "target_new": "Lima"}


@pytest.fixture
def model(family):
    return tiny.make_model(family, dtype=torch.float32)


@pytest.fixture
def hparams():
    return MetaFTHyperParams(model_name="tiny", device="cpu", layers=[1], lr=0.01, num_steps=5)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_edit_in_place_and_restore_to_the_bit(model, tokenizer, hparams):
    before, request, side = state(model), copy.deepcopy(REQUEST), tokenizer.padding_side
    model.train()
    edited, original = apply_metaft_to_model(model, tokenizer, [request], hparams, return_orig_weights=True)
    assert edited is model and request == REQUEST and tokenizer.padding_side == side and model.training
    assert set(original) == set(select_parameters(model, [1]))
    apply_snapshot(dict(model.named_parameters()), original)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_copy_leaves_the_model_alone_and_originals_only_when_asked(model, tokenizer, hparams):
    before = state(model)
    edited, original = apply_metaft_to_model(model, tokenizer, [REQUEST], hparams, copy=True)
    assert edited is not model and original == {}
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert not all(torch.equal(before[name], value) for name, value in state(edited).items())


def test_the_same_edit_in_any_shape_of_request(model, tokenizer, hparams):
    shapes = [
        [REQUEST],
        REQUEST,
        [{"prompt": "{} is a citizen of", "subject": "Ann Lee", "target_new": "Peru"}],
        [{"prompt": REQUEST["prompt"], "target_new": {"str": " Peru", "id": "Q1"}}],
    ]
    results = []
    for shape in shapes:
        edited, _ = apply_metaft_to_model(model, tokenizer, shape, hparams, copy=True)
        results.append(snapshot(select_parameters(edited, [1])))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_several_facts_get_k_passes_with_one_optimiser(model, tokenizer, hparams):
    """Against the obvious loop with torch's optimiser, fact after fact, pass after pass."""
    model = model.double()  # a key bias has no gradient but rounding
    edited, _ = apply_metaft_to_model(model, tokenizer, [REQUEST, OTHER], hparams, copy=True)
    parameters = select_parameters(model, [1])
    edits = [EditRequest(r["prompt"], r["target_new"]) for r in (REQUEST, OTHER)]
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.01)
    for _ in range(5):
        for batch in encode_requests(TextEncoder(tokenizer), [edits]):
            optimizer.zero_grad()
            compute_answer_loss(model, batch).backward()
            optimizer.step()
    for name, value in select_parameters(edited, [1]).items():
        torch.testing.assert_close(value.data, parameters[name].data, rtol=1e-7, atol=1e-9)


def test_a_failure_in_the_middle_puts_the_weights_back(model, tokenizer, hparams, monkeypatch):
    before, calls = state(model), []

    def fails_later(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return compute_answer_loss(*args)

    monkeypatch.setattr("propmeta_edit.finetune.inner_loop.compute_answer_loss", fails_later)
    with pytest.raises(ModelError, match=r"out of memory in an edit, .*: edit fewer layers, .* or --device cpu") as found:
        apply_metaft_to_model(model, tokenizer, [REQUEST], hparams)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert all(p.requires_grad for p in model.parameters())
    assert is_out_of_memory(found.value), "so that who catches this tries with less"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({**REQUEST, "target_new": ""}, "request 0: target_new must be a non-empty string, got ''"),
        ({**REQUEST, "target_new": None}, "target_new must be a non-empty string, got None"),
        ({**REQUEST, "prompt": " "}, "prompt must be a non-empty string, got ' '"),
        ({**REQUEST, "subject": "Bob"}, "the subject 'Bob' does not occur in its prompt 'Ann Lee is a citizen of'"),
    ],
)
def test_requests_that_cannot_be_carried_out(tokenizer, hparams, request_, message):
    model = tiny.make_model("llama", dtype=torch.float32)
    before = state(model)
    with pytest.raises(RequestError) as caught:
        apply_metaft_to_model(model, tokenizer, [request_], hparams)
    assert message in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_no_request_a_wrong_layer_and_half_precision_are_refused(tokenizer, hparams):
    model = tiny.make_model("llama", dtype=torch.float32)
    with pytest.raises(RequestError, match="there is no request"):
        apply_metaft_to_model(model, tokenizer, [], hparams)
    hparams.layers = [11]
    with pytest.raises(ModelError, match="layer 11 is outside the model"):
        apply_metaft_to_model(model, tokenizer, [REQUEST], hparams)
    hparams.layers = [1]
    with pytest.raises(ModelError, match=r"must be fp32, but model\.layers\.1\.self_attn\.q_proj\.weight is torch\.bfloat16"):
        apply_metaft_to_model(model.bfloat16(), tokenizer, [REQUEST], hparams)
