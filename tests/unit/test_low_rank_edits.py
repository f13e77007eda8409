"""Edits that are kept as factors: what stands in a model, on disk, and in a batch."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.edit import Edit, merge_edits
from propmeta_edit.edits.identity import hash_tensors
from propmeta_edit.edits.lora import approximate
from propmeta_edit.edits.views import EditedModel, generate_with_edits
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import give_input_moments
from propmeta_edit.finetune.low_rank import LowRankWeights
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest

REQUESTS = [EditRequest("Ann Lee lives in", "Peru", "Ann Lee"), EditRequest("Bo Smith works at", "Lego", "Bo Smith")]
PROMPTS = ["Ann Lee lives in", "Where?", "Bo Smith works at", "The"]
KINDS = ["llama", "gpt2", "qwen2"]
SETTINGS = EditSettings([1], inner_lr=0.05, num_inner_steps=3, inner_step="whitened", positions="subject")


def make_model(kind, layer=1):
    """With moments that whiten nothing."""
    model = tiny.make_model(kind, dtype=torch.float32)
    names = [name for name in select_parameters(model, [layer]) if name.endswith(".weight")]
    axis = 0 if kind == "gpt2" else 1
    moments = {name.removesuffix(".weight"): torch.eye(model.get_parameter(name).shape[axis]) for name in names}
    give_input_moments(model, moments)
    return model


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_edit_is_its_factors_and_gives_the_same_bits(kind, tokenizer, tmp_path):
    model, other = make_model(kind), tiny.make_model(kind, dtype=torch.float32)
    before, edit = values_of(model), compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    assert isinstance(edit.weights, LowRankWeights) and edit.before.keys() == edit.weights.keys()
    with edit.applied(model):
        edited = values_of(model)
    assert same(values_of(model), before), "undone to the bit"
    moved = {name for name in before if not torch.equal(before[name], edited[name])}
    assert moved == set(edit.weights) and all(name.endswith(".weight") for name in moved)
    assert all(torch.equal(edited[name], edit.weights[name]) for name in moved)

    saved = edit.save(tmp_path / "edit")
    assert saved.lost == 0 and saved.num_bytes == sum(file.stat().st_size for file in (tmp_path / "edit").iterdir())
    tensors = load_file(tmp_path / "edit" / "edit_model.safetensors")
    assert tensors.keys() == {f"{name}.{letter}" for name in moved for letter in "AB"}
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.before is None and loaded.base_sha256 == edit.base_sha256 and loaded.requests == edit.requests
    assert (loaded.shapes, loaded.dtypes) == (edit.shapes, edit.dtypes)
    with loaded.applied(other):
        assert same(values_of(other), edited)
    assert same(values_of(other), before)
    assert all(torch.allclose(loaded.change()[n], edited[n] - before[n], atol=1e-6) for n in moved), "known without a model"
    loaded.save(tmp_path / "again")
    for name in ("edit_model.safetensors", "edit_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "edit" / name).read_bytes()
    with pytest.raises(ModelError, match="holds its change alone, as factors"):
        next(iter(loaded.weights.values()))
    assert loaded.save_lora(tmp_path / "lora") == 0.0


def test_a_folder_of_factors_that_was_changed_is_refused(tokenizer, tmp_path):
    model = make_model("llama")
    compute_edit(model, tokenizer, REQUESTS[0], SETTINGS).save(tmp_path / "edit")
    file, config = tmp_path / "edit" / "edit_model.safetensors", tmp_path / "edit" / "edit_config.json"
    assert Edit.load(tmp_path / "edit").base == compute_edit(model, tokenizer, REQUESTS[1], SETTINGS).base
    whole, text = file.read_bytes(), config.read_text()
    file.write_bytes(whole[:-4] + b"\0\0\1\0")
    with pytest.raises(ModelError, match=r"is damaged: edit_model\.safetensors is not what edit_config\.json says"):
        Edit.load(tmp_path / "edit")
    file.write_bytes(whole)
    for changed in ({"dtype": "no such"}, {"tensors": {"model.layers.1.mlp.up_proj.bias": [2]}}):
        config.write_text(json.dumps({**json.loads(text), **changed}))
        with pytest.raises(ModelError, match="is damaged"):
            Edit.load(tmp_path / "edit")


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_tolerance_a_folder_is_smaller(kind, tokenizer, tmp_path):
    """What is lost is measured, the same edit comes back every time, and the model's own bits after it."""
    model = make_model(kind)
    before, edit = values_of(model), compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    whole = edit.change()
    norm = sum(float(value.double().square().sum()) for value in whole.values()) ** 0.5
    sizes = []
    for tolerance in (0.6, 0.2, 1e-5):
        saved = edit.save(tmp_path / str(tolerance), tolerance=tolerance)
        small = Edit.load(tmp_path / str(tolerance))
        missing = sum(float((whole[n].double() - small.change()[n].double()).square().sum()) for n in whole) ** 0.5 / norm
        assert 0 < saved.lost <= tolerance and saved.lost == pytest.approx(missing, rel=1e-2, abs=1e-6)
        with small.applied(model):
            assert all(torch.allclose(model.get_parameter(n), before[n] + small.change()[n], atol=1e-6) for n in whole)
        assert same(values_of(model), before)
        smaller = small.save(tmp_path / f"{tolerance} again", tolerance=0.9)
        assert smaller.num_bytes <= saved.num_bytes, "a loaded one needs no model for that"
        sizes.append(saved.num_bytes)
    assert sizes[0] <= sizes[1] < sizes[2] and sizes[0] < sizes[2]
    assert {pair[0].dtype for pair in Edit.load(tmp_path / "0.2").factors.values()} == {torch.bfloat16}
    for tolerance in (0, 1, -0.5):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            edit.save(tmp_path / "no", tolerance=tolerance)
    assert not (tmp_path / "no").exists()


def test_an_edit_of_any_method_can_be_saved_as_factors(tokenizer, tmp_path):
    """What it loses is given back; its biases count; loaded from disk it needs its model for that, and then comes back."""
    model = tiny.make_model("qwen2", dtype=torch.float32)
    before = values_of(model)
    edit = compute_edit(model, tokenizer, REQUESTS[0], EditSettings([1], inner_lr=0.02, num_inner_steps=3))
    edit.save(tmp_path / "whole")
    assert edit.factors is None and any(name.endswith(".bias") for name in edit.weights)
    saved = [
        edit.save(tmp_path / "one", tolerance=0.5),
        Edit.load(tmp_path / "whole").save(tmp_path / "two", tolerance=0.5, model=model),
    ]
    assert saved[0] == saved[1] and 0.1 < saved[0].lost <= 0.5
    for folder in ("one", "two"):
        small = Edit.load(tmp_path / folder)
        assert small.factors and not any(name.endswith(".bias") for name in small.weights)
        with small.applied(model):
            assert not same(values_of(model), before)
        assert same(values_of(model), before)
    with pytest.raises(ModelError, match="give the model it was made on"):
        Edit.load(tmp_path / "whole").save(tmp_path / "three", tolerance=0.5)


def test_factors_are_cut_like_their_product():
    """Of any number of rows, more than the matrix has as well; the same singular values go, and the same is lost."""
    draw = torch.Generator().manual_seed(0)
    for rows in (3, 9, 40):
        a, b = torch.randn(rows, 12, generator=draw), torch.randn(7, rows, generator=draw)
        for chosen in ({"rank": 2}, {"tolerance": 0.3}, {"tolerance": 1e-6}):
            [(a_cut, b_cut)], lost = _cut({"m.w.weight": (a, b)}, chosen)
            [(a_dense, b_dense)], lost_dense = _cut({"m.w.weight": b.double() @ a.double()}, chosen)
            assert a_cut.shape == a_dense.shape and lost == pytest.approx(lost_dense, rel=1e-4, abs=1e-9)
            torch.testing.assert_close(b_cut.double() @ a_cut.double(), b_dense.double() @ a_dense.double(), rtol=1e-2, atol=0.1)


def _cut(change, chosen):
    factors, lost = approximate(change, **chosen)
    return list(factors.values()), lost


@pytest.mark.parametrize("kind", KINDS)
def test_rows_answer_with_factors_as_one_by_one(kind, tokenizer, monkeypatch, tmp_path):
    """No weights are made for a batch, but where an edit of another kind is in it; loaded and cut edits as well."""
    model = make_model(kind)
    before, edits = values_of(model), edit_many(model, tokenizer, REQUESTS, SETTINGS)
    edits[1].save(tmp_path / "small", tolerance=0.05)
    small = Edit.load(tmp_path / "small")
    dense = compute_edit(model, tokenizer, REQUESTS[1], EditSettings([1], "mlp", 0.02, 3))
    expected = {id(edit): EditedModel(model, edit).answer(tokenizer, PROMPTS) for edit in (*edits, small, dense)}
    expected[id(None)] = generate_greedily(model, tokenizer, PROMPTS)

    def ask(*own):
        return generate_with_edits(model, tokenizer, PROMPTS, own) == [expected[id(e)][n] for n, e in enumerate(own)]

    with monkeypatch.context() as factors_alone:
        factors_alone.setattr("propmeta_edit.edits.views.stacked_weights", lambda *_: pytest.fail("weights were made"))
        assert ask(edits[0], edits[1], None, small) and ask(small, small, edits[0], edits[0]) and ask(None, None, edits[1], None)
    assert ask(edits[0], None, dense, small)
    assert same(values_of(model), before) and len({str(texts) for texts in expected.values()}) > 1


def test_edits_of_factors_stand_together_and_are_pinned_and_merged(tokenizer, tmp_path):
    model, other = make_model("llama"), tiny.make_model("llama", seed=3, dtype=torch.float32)
    before, (first, second) = values_of(model), edit_many(model, tokenizer, REQUESTS, SETTINGS)
    with first.applied(model), second.applied(model):
        both = values_of(model)
    merged = merge_edits(model, [first, second])
    for name in first.weights:
        total = before[name] + first.change()[name] + second.change()[name]
        torch.testing.assert_close(both[name], total)
        assert torch.equal(merged.weights[name], both[name])
    assert same(values_of(model), before)
    first.save(tmp_path / "edit")
    for edit in (first, Edit.load(tmp_path / "edit")):
        own, pinned = values_of(other), edit.pin_to(other)
        with pinned.applied(other):
            for name, change in first.change().items():
                torch.testing.assert_close(other.get_parameter(name).data, own[name] + change)
        assert same(values_of(other), own)
        with pytest.raises(ModelError, match="made on other weights"):
            pinned.apply(model)
    part = first.only({"model.layers.1.mlp.up_proj.weight"})
    with part.applied(model):
        found = values_of(model)
    assert [name for name in before if not torch.equal(before[name], found[name])] == list(part.weights)


def test_folders_of_before_load(tokenizer, tmp_path):
    """Of tensors, with what they were made on as plain JSON beside them."""
    model = make_model("llama")
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    with edit.applied(model):
        edited = {name: model.get_parameter(name).detach().clone() for name in edit.weights}
    edit.save(tmp_path / "edit")
    file, config = tmp_path / "edit" / "edit_model.safetensors", tmp_path / "edit" / "edit_config.json"
    about = json.loads(config.read_text())
    del about["dtype"]
    config.write_text(json.dumps({**about, "sha256": hash_tensors(edited)}))
    save_file(edited, file, {"base": json.dumps(dict(edit.base))})
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.factors is None and loaded.base == edit.base
    with loaded.applied(model):
        assert all(torch.equal(model.get_parameter(name), value) for name, value in edited.items())
