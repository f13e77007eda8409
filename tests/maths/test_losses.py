"""The answer-only loss: closed forms, and independence of padding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from propmeta_edit.analysis.lens import read_states
from propmeta_edit.finetune.losses import compute_answer_loss, reduce_answer_tokens
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.forwards import compute_hidden_states
from propmeta_edit.models.layers import get_blocks, select_parameters
from propmeta_edit.text.encoding import IGNORED, EncodedBatch, TextEncoder, collate

TEXTS = [("Ann Lee is a citizen of", "Peru"), ("The capital of France is", "Paris in Greece"), ("Lima", "Spanish")]


def test_mean_and_sum_by_hand():
    """Two texts with one and two answer tokens whose probabilities are written down."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [5, 6, IGNORED, 8]])  # nothing predicts the first token, labelled or not
    batch = EncodedBatch(ids, labels)
    assert batch.scored.tolist() == [[0, 1, 1], [2, 1, 3]]
    nll = torch.tensor([-math.log(0.1), -math.log(0.2), -math.log(0.75)], dtype=torch.float64)
    assert reduce_answer_tokens(nll, batch).tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item() / 2], rel=1e-12)
    assert reduce_answer_tokens(nll, batch, "sum").tolist() == pytest.approx([nll[0].item(), (nll[1] + nll[2]).item()])
    with pytest.raises(ValueError, match="median"):
        reduce_answer_tokens(nll, batch, "median")


def test_losses_of_a_text_are_added_in_one_order():
    """On a GPU, sums into a common place by atomic operations come in any order; the gradient is each loss's own share, exactly."""
    ids = torch.arange(14).view(2, 7)
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3, 4, 5, 6], [IGNORED] * 5 + [12, 13]])
    batch = EncodedBatch(ids, labels)
    token_losses = torch.rand(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function.name())
            if "index_put" in function.name():
                assert arguments[3:] in ((), (False,)), "accumulates"
            return function(*arguments, **(keywords or {}))

    with Watch():
        losses = reduce_answer_tokens(token_losses, batch)
        [gradient] = torch.autograd.grad(losses.sum(), [token_losses])
    assert seen and not any(name.startswith(("aten::index_add", "aten::scatter_add", "aten::scatter_reduce")) for name in seen)
    assert torch.equal(gradient, torch.tensor([1 / 5] * 5 + [1 / 2] * 2))
    torch.testing.assert_close(losses, torch.stack([token_losses[:5].mean(), token_losses[5:].mean()]))


def test_loss_equals_the_obvious_one(family, tokenizer):
    """Against log-softmax of the whole model's logits, read position by position."""
    model = tiny.make_model(family)
    ids, labels = TextEncoder(tokenizer).encode_answer(*TEXTS[1])
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        terms = [-logp[i - 1, token].item() for i, token in enumerate(labels) if token != IGNORED]
        loss = compute_answer_loss(model, collate([(ids, labels)]))
    assert len(terms) > 1
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-10)


ALL_FAMILIES = [*tiny.FAMILIES, "gemma3_text"]  # the last has layers that look through a window


def mask_of(texts):
    """1 on the texts' own tokens, as transformers would be told of padding."""
    width = max(len(ids) for ids, _ in texts)
    return torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_hidden_states_are_those_of_the_model_itself(name, tokenizer, attention):
    """To the bit, with and without padding."""
    model = tiny.make_model(name, dtype=torch.float32)
    model.set_attn_implementation(attention)
    for texts in (TEXTS, TEXTS[:1]):
        batch = collate([TextEncoder(tokenizer).encode_answer(*text) for text in texts])
        with torch.no_grad():
            plain = model.base_model(batch.input_ids, use_cache=False)
            assert torch.equal(compute_hidden_states(model, batch), plain.last_hidden_state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_padding_on_the_right_needs_no_mask(name, tokenizer, attention):
    """Losses and gradients are those behind a mask, in float64, and whatever the padding is."""
    model = tiny.make_model(name)
    model.set_attn_implementation(attention)
    texts = [TextEncoder(tokenizer).encode_answer(*text) for text in TEXTS]
    found = []
    for batch in (collate(texts), collate(texts, pad_id=17), replace(collate(texts), attention_mask=mask_of(texts))):
        parameters = select_parameters(model, [0, 1])
        losses = compute_answer_loss(model, batch, num_edits=3)
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), list(parameters.values()))))
    (plain, gradients), *others = found
    for losses, other_gradients in others:
        torch.testing.assert_close(plain, losses, rtol=1e-15, atol=4e-15)
        for ours, theirs in zip(gradients, other_gradients, strict=True):
            assert (ours - theirs).abs().max() <= 5e-16 * max(1.0, ours.abs().max().item()) * 8


def test_batch_mean_is_mean_of_singles(family, tokenizer):
    model = tiny.make_model(family)
    encoded = [TextEncoder(tokenizer).encode_answer(*text) for text in TEXTS]
    assert len({len(ids) for ids, _ in encoded}) == 3
    with torch.no_grad():
        singles = [compute_answer_loss(model, collate([one])).item() for one in encoded]
        together = compute_answer_loss(model, collate(encoded)).item()
    assert together == pytest.approx(sum(singles) / 3, rel=1e-9)


def test_each_edit_has_the_mean_over_its_own_texts(tokenizer):
    model = tiny.make_model("llama")
    encoded = [TextEncoder(tokenizer).encode_answer(*text) for text in (*TEXTS, TEXTS[0])]
    with torch.no_grad():
        singles = [compute_answer_loss(model, collate([one])).item() for one in encoded]
        loss = compute_answer_loss(model, collate(encoded), num_edits=2)
    assert loss.tolist() == pytest.approx([sum(singles[:2]) / 2, sum(singles[2:]) / 2], rel=1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_edits", [1, 2])  # without padding, and with it
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_an_inner_step_does_not_wait_for_the_device(name, tokenizer, num_edits, attention, monkeypatch):
    """Tensors without contents can be computed with only where no number has to be read to know a shape or a mask.

    The fused optimiser alone is left out, which refuses such tensors. The model knows its padding token, for which GPT-2 would look
    among the ids.
    """
    model = tiny.make_model(name).to("meta")
    model.set_attn_implementation(attention)
    # The first releases of transformers 5 ask torch whether autocast is on for the device, which torch does not say of this one.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    assert model.config.pad_token_id is not None
    texts = [TextEncoder(tokenizer).encode_answer(*text) for text in TEXTS[:num_edits]]
    assert (len({len(ids) for ids, _ in texts}) > 1) == (num_edits > 1)
    batch = collate(texts).to("meta")
    parameters = select_parameters(model, [1])
    with stacked_weights(model, parameters, num_edits) as adapted, only_trainable(model, adapted.parameters):
        prefix = FrozenPrefix(model, adapted.parameters)
        with prefix.skipped(prefix.compute_states(batch)):
            loss = compute_answer_loss(model, batch, num_edits=num_edits)
        gradients = torch.autograd.grad(loss.sum(), list(adapted.parameters.values()))
    assert loss.shape == (num_edits,) and loss.is_meta and len(gradients) == len(parameters)
    with pytest.raises((NotImplementedError, RuntimeError)):
        batch.labels[batch.labels != IGNORED]  # what would wait


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_no_number_is_read_in_a_step_on_padded_texts(name, tokenizer, attention):
    """Counted on tensors with contents: an item taken out of a tensor is what a GPU waits for."""
    model = tiny.make_model(name)
    model.set_attn_implementation(attention)
    batch = collate([TextEncoder(tokenizer).encode_answer(*text) for text in TEXTS])
    reads = []

    class CountReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.name() in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"):
                reads.append(function.name())
            return function(*arguments, **(keywords or {}))

    with CountReads():
        losses = compute_answer_loss(model, batch, num_edits=3)
        torch.autograd.grad(losses.sum(), list(select_parameters(model, [1]).values()))
        assert not reads
        bool(losses.isfinite().all())  # what is counted
    assert reads


def test_a_model_that_caps_its_logits_is_trained_and_asked_with_the_cap(tokenizer):
    """As transformers' own forward has it: without the cap, every probability would be another one."""
    model = tiny.make_model("gemma3_text")
    model.config.final_logit_softcapping = 3.0
    encoded = TextEncoder(tokenizer, model.config).encode_answer(*TEXTS[1])
    batch = collate([encoded])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORED)
        torch.testing.assert_close(compute_answer_loss(model, batch), expected[None], rtol=1e-12, atol=0)
        hook = get_blocks(model)[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
        found: list[torch.Tensor] = []
        model(input_ids=batch.input_ids)
        hook.remove()
        torch.testing.assert_close(read_states(model, found[0]), logits.log_softmax(dim=-1), rtol=1e-12, atol=1e-12)
