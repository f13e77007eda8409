"""Edits one after another: the whitened step by the closed form of what it remembers, and what goes with weights put back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from test_inner_steps import REQUESTS, WHITENED, moments_of

from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.finetune import written_inputs
from propmeta_edit.finetune.input_moments import InputMoments, find_whiteners, give_input_moments
from propmeta_edit.finetune.single_edit import compute_facts, put_in_place, write_facts
from propmeta_edit.finetune.written_inputs import standing_whiteners
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

SUBJECTS = [EditRequest("Ann Lee lives in", "Peru", "Ann Lee"), EditRequest("Bo Lee lives in", "Greece", "Bo Lee")]


@pytest.fixture
def model():
    made = tiny.make_model("llama").double()
    give_input_moments(made, moments_of(made))
    return made


def whiteners(model, settings=WHITENED):
    return standing_whiteners(model, select_parameters(model, [1]), settings.damping)


@pytest.mark.parametrize("positions", ["all", "subject"])
def test_whiteners_take_in_every_token_that_standing_edits_wrote_at(model, tokenizer, positions):
    settings = replace(WHITENED, positions=positions)
    damped = {path: torch.linalg.inv(inverse) for path, inverse in whiteners(model).items()}
    for request in SUBJECTS:
        weights = compute_facts(model, tokenizer, [request], settings).weights
        write_facts(model, tokenizer, [request], settings)
        for path, x in weights.inputs.items():
            damped[path] = damped[path] + x.T @ x
        found = whiteners(model)
        assert found.keys() == damped.keys() == weights.inputs.keys()
        for path, inverse in found.items():
            torch.testing.assert_close(inverse, torch.linalg.inv(damped[path]))


def test_the_tokens_are_those_that_the_projection_reads(model, tokenizer):
    """Of the subject, and of every batch of an edit in several."""
    seen = []
    reads = model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    one = replace(WHITENED, num_inner_steps=1, positions="subject", batch_size=1)
    found = compute_facts(model, tokenizer, SUBJECTS, one).weights.inputs["model.layers.1.self_attn.v_proj"]
    reads.remove()
    batches = encode_requests(TextEncoder(tokenizer), [SUBJECTS], batch_size=1, positions="subject")
    assert len(batches) == 2 and sum(bool(row.any()) for row in found) == sum(int((batch.written >= 0).sum()) for batch in batches)
    rows = torch.cat([states.flatten(0, 1) for states in seen])
    assert all(any(torch.allclose(row, other) for other in rows) for row in found if row.any())


def test_weights_that_are_put_back_take_their_edits_with_them(model, tokenizer):
    """Back by the tensors, by copies into them as EasyEdit does it, and of two edits the later alone."""
    fresh = whiteners(model)
    parameters = select_parameters(model, [1])
    original = write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    after_one = whiteners(model)
    assert any(not torch.equal(after_one[path], fresh[path]) for path in fresh)
    between = {name: value.clone() for name, value in write_facts(model, tokenizer, REQUESTS[1:], WHITENED).items()}
    after_two = whiteners(model)
    with torch.no_grad():
        for name, value in between.items():
            parameters[name][...] = value
    assert all(torch.equal(whiteners(model)[path], after_one[path]) for path in fresh)
    assert any(not torch.equal(after_two[path], after_one[path]) for path in fresh)
    put_in_place(parameters, original)
    assert all(torch.equal(whiteners(model)[path], fresh[path]) for path in fresh)
    again = write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    assert all(torch.equal(value, original[name]) for name, value in again.items())


def test_an_edit_of_a_model_that_was_put_back_has_the_bits_of_the_first(model, tokenizer):
    first = dict(compute_facts(model, tokenizer, REQUESTS[1:], WHITENED).weights)
    put_in_place(select_parameters(model, [1]), write_facts(model, tokenizer, REQUESTS[:1], WHITENED))
    again = dict(compute_facts(model, tokenizer, REQUESTS[1:], WHITENED).weights)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_whiteners_of_edits_that_stand_are_not_computed_anew_for_each_that_is_put_back(model, tokenizer, monkeypatch):
    """As in EasyEdit's editor, after a sequential edit: many edits, each put back."""
    counted, after = [], written_inputs._after
    monkeypatch.setattr(written_inputs, "_after", lambda inputs, found: counted.append(1) or after(inputs, found))
    write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    parameters = select_parameters(model, [1])
    for _ in range(3):
        put_in_place(parameters, write_facts(model, tokenizer, REQUESTS[1:], WHITENED))
    assert len(counted) == 1


def test_edit_objects_that_stand_are_remembered_until_they_are_undone(model, tokenizer):
    fresh = whiteners(model)
    edit = compute_edit(model, tokenizer, REQUESTS[0], WHITENED)
    assert all(torch.equal(whiteners(model)[path], fresh[path]) for path in fresh), "a computed edit stands nowhere"
    edit.apply(model)
    stood = whiteners(model)
    expected = {path: torch.linalg.inv(torch.linalg.inv(fresh[path]) + x.T @ x) for path, x in edit.weights.inputs.items()}
    for path, inverse in expected.items():
        torch.testing.assert_close(stood[path], inverse)
    edit.undo(model)
    assert all(torch.equal(whiteners(model)[path], fresh[path]) for path in fresh)


def test_projections_that_read_the_same_share_one_inverse(model, tokenizer):
    moments = moments_of(model)
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    give_input_moments(model, {**moments, **dict.fromkeys(attention, moments[attention[0]])})
    write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    found = whiteners(model)
    assert len({id(found[path]) for path in attention}) == 1 and len({id(value) for value in found.values()}) == len(found) - 2


def test_a_later_edit_moves_what_the_tokens_of_an_earlier_one_give_less(model, tokenizer, monkeypatch):
    """Against the same edit by steps that know nothing of the earlier one; both move the weights as far."""
    give_input_moments(model, {path: 1e-3 * value for path, value in moments_of(model).items()})  # no more than a token's own
    settings = replace(WHITENED, positions="subject")
    earlier = compute_facts(model, tokenizer, SUBJECTS[:1], settings).weights.inputs
    write_facts(model, tokenizer, SUBJECTS[:1], settings)
    known = compute_facts(model, tokenizer, SUBJECTS[1:], settings).weights.changes()
    monkeypatch.setattr("propmeta_edit.finetune.inner_steps.standing_whiteners", find_whiteners)
    unknown = compute_facts(model, tokenizer, SUBJECTS[1:], settings).weights.changes()
    for path, x in earlier.items():
        name = f"{path}.weight"
        assert float((known[name] @ x.T).norm()) < 0.5 * float((unknown[name] @ x.T).norm())
    sizes = [sum(float(change.square().sum()) for change in changes.values()) ** 0.5 for changes in (known, unknown)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


def test_damping_and_layers_of_another_kind_are_computed_anew(model, tokenizer):
    write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    first, other = whiteners(model), whiteners(model, replace(WHITENED, damping=1.0))
    attention = standing_whiteners(model, select_parameters(model, [1], "attention"), WHITENED.damping)
    assert all(not torch.equal(first[path], other[path]) for path in first)
    assert attention.keys() < first.keys() and all(torch.equal(attention[path], first[path]) for path in attention)
    moments = InputMoments(moments_of(model))
    assert all(
        not torch.equal(value, moments.inverse(path, WHITENED.damping, torch.device("cpu"))) for path, value in attention.items()
    )
