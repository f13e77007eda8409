"""A frozen block as one operation: transformers' numbers and their gradient, and the block's own way wherever it does not apply."""

from __future__ import annotations

import platform

import pytest
import tiny
import torch
from transformers import DynamicCache

from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models import frozen_blocks, packed
from propmeta_edit.models.devices import has_native_bf16
from propmeta_edit.models.layers import cast_around, get_blocks, select_parameters
from propmeta_edit.models.packed import packed_products
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="packed products are for x86")
needs_bf16 = pytest.mark.skipif(not has_native_bf16("cpu"), reason="no bf16 here")
FACTS = [("Ann Lee is a citizen of", "Peru"), ("The capital of the land where Bob lives is", "Lima")]
KINDS = ["llama", "qwen2", "mistral"]


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    """Tiny models' projections are below the size from which a packed copy pays."""
    monkeypatch.setattr(packed, "SMALLEST", 1)


def make(family, dtype=torch.float32):
    model = tiny.make_model(family, dtype=dtype)
    model.set_attn_implementation("eager")
    return model


def make_batch(tokenizer):
    """Two texts of different length: the shorter one is padded."""
    return encode_requests(TextEncoder(tokenizer), [[EditRequest(*fact)] for fact in FACTS])[0]


def losses_and_gradients(model, batch, is_packed=True):
    """Losses of the two texts, and the gradient of the first of three layers, by which two frozen blocks stand."""
    parameters = select_parameters(model, [0])
    with only_trainable(model, parameters):
        if is_packed:
            with packed_products(model, parameters):
                losses = compute_answer_loss(model, batch, num_edits=2)
        else:
            losses = compute_answer_loss(model, batch, num_edits=2)
        return losses.detach(), torch.autograd.grad(losses.sum(), list(parameters.values()))


def count_calls(monkeypatch):
    calls, apply = [], frozen_blocks._apply
    monkeypatch.setattr(frozen_blocks, "_apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def off(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_losses_and_gradients_are_transformers(tokenizer, monkeypatch, family):
    model, batch, calls = make(family), make_batch(tokenizer), count_calls(monkeypatch)
    expected, plain = losses_and_gradients(model, batch, is_packed=False)
    assert not calls
    losses, gradients = losses_and_gradients(model, batch)
    assert len(calls) == 4, "two blocks above the trained one, each tried once"
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert off(gradients, plain) < 1e-5
    losses_and_gradients(model, batch)
    assert len(calls) == 6 and not any("forward" in module.__dict__ for module in model.modules())


def test_its_gradient_is_that_of_differences_of_the_loss(tokenizer):
    """Independent of autograd: the loss a little further along one direction, in both ways."""
    model, batch = make("llama"), make_batch(tokenizer)
    parameters = select_parameters(model, [0])
    _, gradients = losses_and_gradients(model, batch)
    torch.manual_seed(0)
    direction = [torch.randn_like(gradient) / gradient.numel() ** 0.5 for gradient in gradients]

    def loss_at(step):
        with torch.no_grad():
            for parameter, along in zip(parameters.values(), direction, strict=True):
                parameter += step * along
            loss = compute_answer_loss(model, batch, num_edits=2).double().sum()
            for parameter, along in zip(parameters.values(), direction, strict=True):
                parameter -= step * along
        return loss

    slope = sum((gradient.double() * along).sum() for gradient, along in zip(gradients, direction, strict=True))
    assert float((loss_at(0.02) - loss_at(-0.02)) / 0.04) == pytest.approx(float(slope), rel=0.02)


@needs_bf16
@pytest.mark.parametrize("family", KINDS)
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_way(tokenizer, family):
    wide, batch = make(family), make_batch(tokenizer)
    _, exact = losses_and_gradients(wide, batch, is_packed=False)
    narrow = wide.to(torch.bfloat16)
    for name, parameter in select_parameters(narrow, [0]).items():
        parameter.data = parameter.data.float()
        cast_around(narrow.get_submodule(name.rpartition(".")[0]))
    expected, plain = losses_and_gradients(narrow, batch, is_packed=False)
    losses, gradients = losses_and_gradients(narrow, batch)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)
    assert off(gradients, exact) < 1.3 * off(plain, exact)


def hook(block):
    block.mlp.down_proj.register_forward_hook(lambda *given: None)


def replace(block):
    block.mlp.forward = block.mlp.forward


@pytest.mark.parametrize("touch", [hook, replace])
def test_a_block_that_is_watched_goes_its_own_way(tokenizer, monkeypatch, touch):
    model, batch, calls = make("llama"), make_batch(tokenizer), count_calls(monkeypatch)
    touch(get_blocks(model)[1])
    losses_and_gradients(model, batch)
    assert len(calls) == 2, "the other block alone"


def test_another_attention_kept_keys_dropout_and_no_gradient_go_the_plain_way(tokenizer, monkeypatch):
    model, batch, calls = make("llama"), make_batch(tokenizer), count_calls(monkeypatch)
    parameters = select_parameters(model, [0])
    with only_trainable(model, parameters), packed_products(model, parameters):
        with torch.no_grad():
            compute_answer_loss(model, batch)
        model(input_ids=batch.input_ids, past_key_values=DynamicCache(), use_cache=True)
        for block in get_blocks(model):
            block.self_attn.attention_dropout = 0.5
        model.train()
        compute_answer_loss(model, batch)
        model.eval().set_attn_implementation("sdpa")
        compute_answer_loss(model, batch)
    assert not calls


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_other_blocks_go_the_plain_way(tokenizer, monkeypatch, family):
    calls = count_calls(monkeypatch)
    losses_and_gradients(make(family), make_batch(tokenizer))
    assert not calls


def test_a_block_that_computes_something_else_goes_its_own_way(tokenizer, monkeypatch, caplog):
    """As another version of transformers might."""
    model, batch = make("llama"), make_batch(tokenizer)
    forward = type(get_blocks(model)[0].mlp).forward
    monkeypatch.setattr(type(get_blocks(model)[0].mlp), "forward", lambda self, states: 2 * forward(self, states))
    expected, plain = losses_and_gradients(model, batch, is_packed=False)
    with caplog.at_level("INFO"):
        losses, gradients = losses_and_gradients(model, batch)
    assert caplog.text.count("computes something else than it is known for") == 2
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert off(gradients, plain) < 1e-5


def test_nothing_of_a_step_is_held_once_its_gradient_is_there(tokenizer):
    """What a block keeps for its gradient goes with the backward pass, not with the loss, which lives on while the next is made."""
    model, batch = make("llama"), make_batch(tokenizer)
    parameters = select_parameters(model, [0])
    with only_trainable(model, parameters), packed_products(model, parameters):
        loss = compute_answer_loss(model, batch).sum()
        nodes = find_nodes(loss.grad_fn)
        assert len(nodes) == 2 and all(node.saved_tensors for node in nodes)
        loss.backward()
        for node in nodes:
            with pytest.raises(RuntimeError, match="after they have already been freed"):
                _ = node.saved_tensors


def find_nodes(node, seen=None):
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return []
    seen.add(node)
    own = [node] if "_BlockFunction" in type(node).__name__ else []
    return own + [found for following, _ in node.next_functions for found in find_nodes(following, seen)]


def test_tokens_that_nothing_is_read_from_are_left_out(tokenizer, monkeypatch):
    """Padding, and each text's last token; unless they are too few."""
    model, batch = make("llama"), make_batch(tokenizer)
    rows, multiply = [], packed.PackedProjection.multiply
    monkeypatch.setattr(packed.PackedProjection, "multiply", lambda self, x: rows.append(x[..., 0].numel()) or multiply(self, x))
    lengths = [len(TextEncoder(tokenizer).encode_answer(*fact)[0]) for fact in FACTS]
    losses_and_gradients(model, batch)  # each block is tried once
    rows.clear()
    losses_and_gradients(model, batch)
    assert set(rows[:-1]) == {sum(lengths) - 2} and sum(lengths) - 2 < 0.9 * batch.input_ids.numel()
    rows.clear()
    [alone] = encode_requests(TextEncoder(tokenizer), [[EditRequest(*FACTS[1])]])
    parameters = select_parameters(model, [0])
    with only_trainable(model, parameters), packed_products(model, parameters):
        compute_answer_loss(model, alone)
    assert set(rows[:-1]) == {lengths[1]}
