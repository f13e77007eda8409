"""Steps that share their texts: what is answered from memory is what would be computed."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit.easyedit.repeated_steps import quick_steps
from propmeta_edit.models.layers import get_blocks

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def count_calls(block):
    calls = []
    module = next(iter(block.children()))  # inside the block, so that it runs where the block does
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("change", ["nothing", "texts", "mask", "weight", "gradient below", "no gradient"])
def test_a_block_below_computes_only_what_it_has_not_just_seen(family, change):
    model = tiny.make_model(family, dtype=torch.float32).requires_grad_(False)
    calls, mask = count_calls(get_blocks(model)[0]), torch.ones_like(IDS)
    with quick_steps(model, {}, 1, is_memits=False):
        model(IDS, attention_mask=mask)
        before, ids = len(calls), IDS
        if change == "texts":
            ids = IDS.flip(1)
        elif change == "mask":
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        elif change == "weight":
            next(get_blocks(model)[0].parameters()).mul_(1.5)
        elif change == "gradient below":
            model.get_input_embeddings().weight.requires_grad_(True)
        with torch.set_grad_enabled(change != "no gradient"):
            found = model(ids, attention_mask=mask).logits
        assert len(calls) == (before if change == "nothing" else before + 1)
    assert not any("forward" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(found, model(ids, attention_mask=mask).logits, rtol=0, atol=1e-5)


def test_blocks_from_the_edited_one_on_are_computed_in_every_step(family):
    model = tiny.make_model(family, dtype=torch.float32).requires_grad_(False)
    calls = count_calls(get_blocks(model)[1])
    with quick_steps(model, {}, 1, is_memits=False):
        model(IDS)
        model(IDS)
    assert len(calls) == 2


def test_memits_steps_have_logits_of_the_last_text_and_its_readings_all(family):
    model = tiny.make_model(family, dtype=torch.float32)
    expected = model(IDS).logits
    with quick_steps(model, {}, 1, is_memits=True):
        in_a_step = model(IDS).logits
        with torch.no_grad():
            reading = model(IDS).logits
    torch.testing.assert_close(in_a_step, expected[-1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(reading, expected, rtol=0, atol=1e-5)


def test_a_product_with_the_heads_matrix_is_the_heads_own(monkeypatch):
    from propmeta_edit.models import packed

    monkeypatch.setattr(packed, "SMALLEST", 1)
    model, states = tiny.make_model("llama", dtype=torch.float32), []
    head = model.get_output_embeddings()
    hidden = torch.randn(2, 3, head.in_features)
    expected = hidden @ head.weight.T
    multiply = packed.PackedProjection.forward
    monkeypatch.setattr(packed.PackedProjection, "forward", lambda self, inputs: states.append(inputs) or multiply(self, inputs))
    with quick_steps(model, {}, 1, is_memits=True):
        found = hidden @ head.weight.T
        others = [hidden @ (2 * head.weight).T, hidden @ head.weight[:5].T]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [id(inputs) for inputs in states] == [id(hidden)], "products with other matrices are torch's own"
    torch.testing.assert_close(others, [2 * expected, expected[..., :5]], rtol=1e-5, atol=1e-5)
