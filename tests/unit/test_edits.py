"""Edit objects: exact application, undoing in any order, files, LoRAs, views, and many edits answering in one batch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from propmeta_edit.edits import compute, identity
from propmeta_edit.edits.compute import choose_at_once, compute_edit, edit_many
from propmeta_edit.edits.edit import Edit, edit_from_weights, merge_edits, standing_edits, take_base
from propmeta_edit.edits.identity import hash_tensors, take_fingerprint, take_identity
from propmeta_edit.edits.saved import CONFIG, WEIGHTS, read_base
from propmeta_edit.edits.views import EditedModel, generate_with_edits
from propmeta_edit.errors import ConfigError, ModelError, RequestError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import give_input_moments
from propmeta_edit.finetune.single_edit import put_in_place
from propmeta_edit.finetune.stacking import StackedWeights, stacked_weights
from propmeta_edit.finetune.weights import snapshot
from propmeta_edit.models.devices import free_memory
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import get_blocks, select_parameters
from propmeta_edit.models.loading import load_model
from propmeta_edit.records import EditRequest
from propmeta_edit.text.prompts import first_line

REQUESTS = [
    EditRequest("Ann Lee lives in", "Peru", "Ann Lee"),
    EditRequest("Smith PLC was founded in", "Greece"),
    EditRequest("The capital is", "Lima in Peru"),
]


def hparams(layers=(1,), **values):
    return SimpleNamespace(model_name="tiny", edit=EditSettings(list(layers), inner_lr=0.02, num_inner_steps=3), **values)


@pytest.fixture
def model(family):
    return tiny.make_model(family)


@pytest.fixture
def edits(model, tokenizer):
    """Three edits of layer 1, and one of layer 2."""
    found = [compute_edit(model, tokenizer, request, hparams()) for request in REQUESTS]
    return [*found, compute_edit(model, tokenizer, REQUESTS[0], hparams([2]))]


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def logits(model):
    return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_computing_leaves_the_model_alone_and_applying_is_exact(model, tokenizer):
    before = values_of(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams())
    assert same(values_of(model), before) and pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert set(edit.weights) == set(select_parameters(model, [1]))
    with edit.applied(model):
        assert standing_edits(model) == [edit]
        inside = values_of(model)
        assert all(torch.equal(inside[name], value) for name, value in edit.weights.items())
        assert all(torch.equal(inside[name], before[name]) != (name in edit.weights) for name in before)
    assert same(values_of(model), before) and standing_edits(model) == []


def test_edits_are_undone_in_every_order(model, edits):
    before = values_of(model)
    alone = {}
    for kept in itertools.chain.from_iterable(itertools.combinations(range(4), size) for size in range(5)):
        for number in kept:
            edits[number].apply(model)
        alone[kept] = values_of(model)
        for number in reversed(kept):
            edits[number].undo(model)
    for order in itertools.permutations(range(4)):
        for edit in edits:
            edit.apply(model)
        left = list(range(4))
        for number in order:
            edits[number].undo(model)
            left.remove(number)
            assert same(values_of(model), alone[tuple(left)]), "as if it had never been there"
        assert same(values_of(model), before)


def test_changes_of_the_same_tensors_add_up(model, edits):
    before = snapshot(select_parameters(model, [1]))
    with edits[0].applied(model), edits[1].applied(model):
        for name, parameter in select_parameters(model, [1]).items():
            expected = before[name] + edits[0].change()[name] + edits[1].change()[name]
            torch.testing.assert_close(parameter.data, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loaded", [False, True])
def test_tensors_that_no_other_edit_moves_are_exact(model, tokenizer, tmp_path, loaded):
    first, second = (compute_edit(model, tokenizer, REQUESTS[n], hparams(layers)) for n, layers in ((0, [0, 1]), (1, [1, 2])))
    if loaded:
        for number, edit in enumerate((first, second)):
            edit.save(tmp_path / str(number))
        first, second = (Edit.load(tmp_path / str(number)) for number in range(2))
    together = merge_edits(model, [second, first]).weights
    with second.applied(model), first.applied(model):
        standing = values_of(model)
    for edit, layer in ((first, 0), (second, 2)):
        for name in select_parameters(model, [layer]):
            assert torch.equal(standing[name], edit.weights[name]) and torch.equal(together[name], edit.weights[name])


def test_an_edit_made_on_another_stands_only_with_it(model, tokenizer, edits):
    edits[0].apply(model)
    on_top = compute_edit(model, tokenizer, REQUESTS[1], hparams())
    on_top.apply(model)
    with_both = values_of(model)
    with pytest.raises(ModelError, match="undo that one first"):
        edits[0].undo(model)
    assert same(values_of(model), with_both) and standing_edits(model) == [edits[0], on_top]
    on_top.undo(model)
    edits[0].undo(model)
    with pytest.raises(ModelError, match="made on other weights"):
        on_top.apply(model)
    assert standing_edits(model) == []
    edits[3].apply(model)
    compute_edit(model, tokenizer, REQUESTS[1], hparams()).apply(model)  # of other tensors: either stands without the other
    edits[3].undo(model)


def test_wrong_uses(model, edits, family):
    with pytest.raises(ModelError, match="does not stand"):
        edits[0].undo(model)
    edits[0].apply(model)
    with pytest.raises(ModelError, match="stands in the model already"):
        edits[0].apply(model)
    edits[0].undo(model)
    with pytest.raises(ModelError, match="made on other weights"):
        edits[0].apply(tiny.make_model(family, seed=1))
    other = "gpt2" if family != "gpt2" else "llama"
    with pytest.raises(ModelError, match="does not fit this model"):
        edits[0].apply(tiny.make_model(other))


def test_writing_into_the_model_after_the_edit_is_noticed(model, tokenizer):
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams())
    name, parameter = next(iter(select_parameters(model, [1]).items()))
    with torch.no_grad():
        parameter[0] += 1.0
    for use in (lambda: edit.apply(model), edit.change):
        with pytest.raises(ModelError, match="were written to since"):
            use()
    assert name in edit.weights


def test_a_saved_edit_gives_the_same_logits_in_a_fresh_process(tokenizer, tmp_path):
    model = tiny.make_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams())
    edit.save(tmp_path / "edit")
    with edit.applied(model):
        torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from propmeta_edit import Edit
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}).eval()
edit = Edit.load({str(tmp_path / "edit")!r})
plain = model(torch.tensor([[5, 6, 7, 8]])).logits
with edit.applied(model):
    edited = model(torch.tensor([[5, 6, 7, 8]])).logits
assert torch.equal(edited, torch.load({str(tmp_path / "logits.pt")!r}))
assert not torch.equal(edited, plain) and torch.equal(model(torch.tensor([[5, 6, 7, 8]])).logits, plain)
assert edit.requests[0].target_new == "Peru" and edit.method == "MetaFT" and edit.settings["inner_lr"] == 0.02
print("the same")
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip().endswith("the same"), done.stderr


@pytest.fixture
def saved(model, edits, tmp_path):
    edits[0].save(tmp_path / "edit")
    return tmp_path / "edit"


def test_loaded_edits_are_the_saved_ones(model, edits, saved):
    loaded = Edit.load(saved)
    assert loaded.requests == edits[0].requests and loaded.base_sha256 == edits[0].base_sha256
    assert all(torch.equal(loaded.weights[name], value) for name, value in edits[0].weights.items())
    with pytest.raises(ModelError, match="give the model it was made on"):
        loaded.change()
    change = loaded.change(model)
    assert all(torch.equal(change[name], value) for name, value in edits[0].change().items())
    with edits[1].applied(model), loaded.applied(model):
        both = values_of(model)
    with edits[1].applied(model), edits[0].applied(model):
        assert same(values_of(model), both)


def test_requests_are_kept_whole(edits, tmp_path):
    request = EditRequest("Ann lives in", "Peru", "Ann", (("Ann's home:", "Peru."),), ("Ann's home is in",))
    replace(edits[0], requests=(request,)).save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").requests == (request,)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no config", "no weights", "no edit"])
def test_damaged_files(saved, damage):
    content = (saved / WEIGHTS).read_bytes()
    if damage == "truncated":
        (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        (saved / WEIGHTS).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "no config":
        (saved / CONFIG).unlink()
    elif damage == "no weights":
        (saved / WEIGHTS).unlink()
    else:
        config = json.loads((saved / CONFIG).read_text())
        del config["requests"]
        (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"damaged|holds no whole edit"):
        Edit.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", None),
        ("settings", "ten steps"),
        ("base_sha256", 5),
        ("base", None),
        ("base_model", 5),
        ("requests", [{"prompt": "", "target_new": "Peru", "augmentation": [], "rephrasings": []}]),
    ],
)
def test_a_config_with_something_else_in_it_names_its_folder(saved, name, value):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, name: value}))
    with pytest.raises(ModelError, match=f"the edit in {saved} is damaged"):
        Edit.load(saved)


@pytest.fixture
def relative(family):
    """The same model but for one matrix that the edits do not move."""
    other = tiny.make_model(family)
    name = next(name for name in select_parameters(other, [2]) if name.endswith(".weight"))
    with torch.no_grad():
        other.get_parameter(name)[3:, 5] += 0.01
    return other, name


def test_a_base_that_differs_elsewhere_is_told_apart(model, edits, saved, relative, tokenizer):
    other, name = relative
    before = values_of(other)
    for edit in (edits[0], Edit.load(saved)):
        uses = [
            lambda edit=edit: edit.apply(other),
            lambda edit=edit: EditedModel(other, edit)(torch.tensor([[5, 6]])),
            lambda edit=edit: generate_with_edits(other, tokenizer, ["Where?"], [edit]),
        ]
        for use in uses:
            with pytest.raises(ModelError, match=f"made on another model .*: 1 tensors .*, {name}; .*any-base"):
                use()
        assert same(values_of(other), before) and standing_edits(other) == []
    with pytest.raises(ModelError, match="made on another model"):
        Edit.load(saved).change(other)
    with Edit.load(saved).applied(model):
        pass


def test_edits_of_other_tensors_do_not_make_another_base(model, tokenizer, edits, saved):
    """Computed without and applied over another edit, and the other way round; what is no ``Edit`` does count."""
    of_layer_1, of_layer_2 = edits[0], edits[3]
    with of_layer_2.applied(model):
        on_top = compute_edit(model, tokenizer, REQUESTS[1], hparams())
        with Edit.load(saved).applied(model), on_top.applied(model):
            assert len(standing_edits(model)) == 3
        assert generate_with_edits(model, tokenizer, ["Where?"], [of_layer_1])
    with on_top.applied(model), of_layer_2.applied(model):
        pass
    of_layer_1.apply(model)
    of_layer_2.apply(model)
    with torch.no_grad():
        next(iter(select_parameters(model, [0]).values())).add_(0.1)
    of_layer_1.undo(model)  # an edit can be taken out whatever became of the model
    assert standing_edits(model) == [of_layer_2]
    with pytest.raises(ModelError, match="take out what was written into this one since"):
        of_layer_1.apply(model)


def test_the_base_is_the_same_in_half_precision(tokenizer, tmp_path):
    folder = str(tiny.save_model_folder(tmp_path / "base", tokenizer))
    edit = compute_edit(load_model(folder)[0], tokenizer, REQUESTS[0], hparams())
    edit.save(tmp_path / "edit")
    half, _ = load_model(folder, dtype="bfloat16", layers=[1])
    assert half.get_parameter("model.layers.2.mlp.up_proj.weight").dtype == torch.bfloat16
    with Edit.load(tmp_path / "edit").applied(half):
        pass
    with torch.no_grad():
        half.get_parameter("model.layers.2.mlp.up_proj.weight").mul_(1.01)
    with pytest.raises(ModelError, match=r"made on another model .* model.layers.2.mlp.up_proj.weight;"):
        edit.apply(half)


def test_an_edit_pinned_to_another_model_belongs_there(model, edits, saved, relative, family, tmp_path):
    other, _ = relative
    before = values_of(other)
    for edit in (edits[0], Edit.load(saved)):
        pinned = edit.pin_to(other)
        with pinned.applied(other):
            assert all(torch.equal(other.get_parameter(name), value) for name, value in edit.weights.items())
        assert same(values_of(other), before)
        with pytest.raises(ModelError, match="made on another model"):
            pinned.apply(model)
    with edits[3].pin_to(other).applied(other), edits[1].pin_to(other).applied(other):
        pinned = edits[0].pin_to(other)  # what stands does not count
    pinned.save(tmp_path / "pinned")
    with Edit.load(tmp_path / "pinned").applied(other):
        pass
    other.config._name_or_path = "models/other"
    assert edits[0].pin_to(other).base_model == "models/other" and edits[0].pin_to(other, "mine").base_model == "mine"
    foreign = tiny.make_model(family, seed=3)
    with edits[0].pin_to(foreign).applied(foreign):  # its edited tensors differ as well
        assert all(torch.equal(foreign.get_parameter(name), value) for name, value in edits[0].weights.items())
    with pytest.raises(ModelError, match=r"is torch\.bfloat16 in this model and torch\.float64 in the edit"):
        edits[0].pin_to(other.bfloat16())


def test_folders_that_cannot_be_written(edits, saved, tmp_path):
    with pytest.raises(ModelError, match="exists; choose another folder"):
        edits[0].save(saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        edits[0].save(tmp_path / "file" / "edit")


def test_low_rank_export_is_a_peft_adapter_and_says_what_it_loses(tokenizer, tmp_path):
    from peft import PeftModel

    model = tiny.make_model("llama")
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams())
    with edit.applied(model):
        exact = logits(model)
    errors = [edit.save_lora(tmp_path / str(rank), rank) for rank in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2] and errors[2] == pytest.approx(0, abs=1e-6)
    adapted = PeftModel.from_pretrained(tiny.make_model("llama"), str(tmp_path / "16")).eval()
    torch.testing.assert_close(logits(adapted), exact, rtol=1e-4, atol=1e-5)
    change = edit.change()
    low = PeftModel.from_pretrained(tiny.make_model("llama"), str(tmp_path / "1")).merge_and_unload()
    parameters, base = dict(low.named_parameters()), dict(model.named_parameters())
    lost = sum(float((parameters[n].detach() - base[n].detach() - change[n]).square().sum()) for n in change)
    assert (lost / sum(float(c.square().sum()) for c in change.values())) ** 0.5 == pytest.approx(errors[0], rel=1e-4)
    with pytest.raises(ModelError, match="exists"):
        edit.save_lora(tmp_path / "1", 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_within_a_tolerance_has_the_ranks_that_it_needs(kind, tokenizer, tmp_path):
    """Each matrix its own; what is lost is measured with rounding, and is what peft's model lacks; peft adds such adapters up."""
    from peft import PeftModel

    model = tiny.make_model(kind)
    edit = with_moved(model, [name for name in select_parameters(model, [1]) if name.endswith(".weight")])
    change = edit.change()
    whole = sum(float(value.square().sum()) for value in change.values())
    sizes, configs = [], []
    for tolerance in (0.5, 0.1, 1e-4):
        folder = tmp_path / str(tolerance)
        lost = edit.save_lora(folder, tolerance=tolerance)
        adapted = PeftModel.from_pretrained(tiny.make_model(kind), str(folder)).merge_and_unload()
        found = dict(adapted.named_parameters())
        missing = sum(float((found[n].data - model.get_parameter(n).data - change[n]).square().sum()) for n in change)
        assert lost <= tolerance and (missing / whole) ** 0.5 == pytest.approx(lost, rel=1e-2, abs=1e-6)
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
        configs.append(json.loads((folder / "adapter_config.json").read_text()))
    assert sizes[0] < sizes[1] < sizes[2]
    assert configs[0]["rank_pattern"] and set(configs[0]["rank_pattern"].values()) < set(range(1, configs[0]["r"]))
    assert {value.dtype for value in load_file(tmp_path / "0.5" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert {value.dtype for value in load_file(tmp_path / "0.0001" / "adapter_model.safetensors").values()} == {torch.float32}
    both = PeftModel.from_pretrained(tiny.make_model(kind), str(tmp_path / "0.1"), adapter_name="one")
    both.load_adapter(str(tmp_path / "0.5"), adapter_name="two")
    both.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")
    both.set_adapter("both")
    assert torch.isfinite(logits(both.eval())).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_of_low_rank_is_a_lora_to_the_last_digit(kind, tokenizer, tmp_path):
    """Alone or side by side: in float64 the factors' product is the change, and peft's model says what the edited one does."""
    from peft import PeftModel

    model = tiny.make_model(kind).double()
    paths = [name.removesuffix(".weight") for name in select_parameters(model, [1]) if name.endswith(".weight")]
    widths = {path: model.get_submodule(path).weight.shape[0 if kind == "gpt2" else 1] for path in paths}
    give_input_moments(model, {path: torch.eye(width).double() for path, width in widths.items()})
    settings = EditSettings([1], inner_lr=0.02, num_inner_steps=3, inner_step="whitened")
    alone, (beside, _) = compute_edit(model, tokenizer, REQUESTS[0], settings), edit_many(model, tokenizer, REQUESTS[:2], settings)
    for number, edit in enumerate((alone, beside)):
        folder = tmp_path / str(number)
        assert edit.save_lora(folder) == 0.0 and edit.factors.keys() == {f"{path}.weight" for path in paths}
        stored = load_file(folder / "adapter_model.safetensors")
        for path in paths:
            a, b = (stored[f"base_model.model.{path}.lora_{letter}.weight"] for letter in "AB")
            change = edit.change()[f"{path}.weight"]
            torch.testing.assert_close((b @ a).T if kind == "gpt2" else b @ a, change, rtol=1e-9, atol=1e-12)
        adapted = PeftModel.from_pretrained(tiny.make_model(kind).double(), str(folder)).eval()
        with edit.applied(model):
            torch.testing.assert_close(logits(adapted), logits(model))


def test_a_lora_needs_a_rank_or_a_tolerance(tokenizer, tmp_path):
    model = tiny.make_model("qwen2")
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams())
    for values in ({}, {"rank": 2, "tolerance": 0.1}):
        with pytest.raises(ConfigError, match="needs a rank or a tolerance, one of the two"):
            edit.save_lora(tmp_path / "lora", **values)
    for tolerance in (0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=f"between 0 and 1, got {tolerance}"):
            edit.save_lora(tmp_path / "lora", tolerance=tolerance)
    with pytest.raises(ModelError, match="changes of biases, which a LoRA cannot hold, are more than the tolerance"):
        edit.save_lora(tmp_path / "lora", tolerance=1e-6)
    assert not (tmp_path / "lora").exists()


def with_moved(model, names):
    """The edit that adds noise to these parameters."""
    parameters = dict(model.named_parameters())
    original = {name: parameters[name].detach().clone() for name in names}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            parameters[name] += 0.1 * torch.randn(parameters[name].shape, generator=noise)
    return edit_from_weights(model, original, REQUESTS[:1], method="FT")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_lora_leaves_biases_out_and_counts_them(kind, tokenizer, tmp_path):
    """GPT-2's projections are turned and all have biases; Qwen2's have them in attention."""
    from peft import PeftModel

    model = tiny.make_model(kind)
    edit = with_moved(model, select_parameters(model, [1]))
    change = edit.change()
    biases = {name: value for name, value in change.items() if name.endswith(".bias")}
    lost, whole = (sum(float(value.square().sum()) for value in some.values()) for some in (biases, change))
    assert len(biases) > 2 and edit.save_lora(tmp_path / "lora", 16) == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    adapted = PeftModel.from_pretrained(tiny.make_model(kind), str(tmp_path / "lora")).merge_and_unload()
    for name, parameter in model.named_parameters():
        moved = change[name] if name in change and name not in biases else 0
        torch.testing.assert_close(adapted.get_parameter(name).data, parameter.data + moved, rtol=1e-4, atol=1e-5)


def test_what_no_lora_can_hold(tokenizer, tmp_path):
    model = tiny.make_model("gpt2")
    with pytest.raises(ModelError, match=r"matrices alone, and this edit moves none; keep the edit itself"):
        with_moved(model, ["transformer.h.1.mlp.c_fc.bias"]).save_lora(tmp_path / "lora", 2)
    for odd in ("transformer.wte.weight", "transformer.wpe.weight"):
        with pytest.raises(ModelError, match=f"matrices alone, and this edit moves {odd}"):
            with_moved(model, ["transformer.h.1.mlp.c_fc.weight", odd]).save_lora(tmp_path / "lora", 2)
    with pytest.raises(ModelError, match=r"matrices alone, and this edit moves transformer.h.1.ln_1.weight"):
        with_moved(model, ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.ln_1.weight"]).save_lora(tmp_path / "lora", 2)
    edit = with_moved(model, ["transformer.h.1.mlp.c_fc.weight"])
    for rank in (0, -1, 2.5, "16"):
        with pytest.raises(ConfigError, match=f"rank of a LoRA must be a whole number, 1 or more, got {rank!r}"):
            edit.save_lora(tmp_path / "lora", rank)
    assert not (tmp_path / "lora").exists()


def test_views_answer_side_by_side(model, edits, tokenizer):
    before = values_of(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    views = [EditedModel(model), EditedModel(model, edits[0]), EditedModel(model, edits[0], edits[3])]
    outputs = [view(ids).logits for view in views]
    assert torch.equal(outputs[0], logits(model))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    with edits[0].applied(model):
        assert torch.equal(outputs[1], logits(model))
    assert views[1].answer(tokenizer, ["Ann Lee lives in"]) != [] and same(values_of(model), before)
    assert views[1].answer(tokenizer, "Ann Lee lives in") == views[1].answer(tokenizer, ["Ann Lee lives in"]), (
        "one text, no letters"
    )
    [said] = views[1].answer(tokenizer, ["Question: Where?\nAnswer: The answer is"])
    assert views[1].ask(tokenizer, "Where?") == first_line(said)
    with pytest.raises(ModelError):
        EditedModel(model, edits[0], edits[0])(ids)
    assert same(values_of(model), before) and standing_edits(model) == []


def test_each_row_of_a_batch_with_its_own_edit(model, edits, tokenizer):
    """Edits of different layers, the same edit twice, and no edit: as one by one."""
    prompts = ["Ann Lee lives in", "Where?", "Smith PLC was founded in the country of", "The", "Ann Lee", "Lima"]
    own = [edits[0], edits[0], edits[1], None, edits[3], edits[2]]
    expected = []
    for prompt, edit in zip(prompts, own, strict=True):
        if edit is None:
            expected += generate_greedily(model, tokenizer, [prompt])
        else:
            with edit.applied(model):
                expected += generate_greedily(model, tokenizer, [prompt])
    before = values_of(model)
    assert generate_with_edits(model, tokenizer, prompts, own) == expected
    assert len(set(expected)) > 3 and same(values_of(model), before)
    assert generate_with_edits(model, tokenizer, prompts[:2], [None, None]) == generate_greedily(model, tokenizer, prompts[:2])
    with pytest.raises(ModelError, match="got 2 prompts and 1 edits"):
        generate_with_edits(model, tokenizer, prompts[:2], [None])


def test_answers_come_in_batches_of_a_bounded_size(model, edits, tokenizer, monkeypatch):
    """As many rows and edits as asked for, or as the memory allows, and the same answers in the same order."""
    prompts = ["Ann Lee lives in", "Where?", "Smith PLC was founded in the country of", "The", "Ann Lee", "Lima", "Lee"]
    own = [edits[0], edits[0], edits[1], None, edits[0], edits[3], None]
    size = sum(value.nbytes for edit in (edits[0], edits[3]) for value in edit.weights.values())
    batches = []

    def note(model, parameters, num_edits):
        batches.append([num_edits])
        return stacked_weights(model, parameters, num_edits)

    def answer(model, tokenizer, prompts, *arguments, **values):
        batches.append([*(batches.pop() if batches and len(batches[-1]) == 1 else [0]), len(prompts)])
        return generate_greedily(model, tokenizer, prompts, *arguments, **values)

    monkeypatch.setattr("propmeta_edit.edits.views.stacked_weights", note)
    monkeypatch.setattr("propmeta_edit.edits.views.generate_greedily", answer)
    expected = generate_with_edits(model, tokenizer, prompts, own)
    assert batches == [[4, 12]], "four kinds of rows, filled up to three each"
    for batch_size, as_expected in (
        (1, [[1, 1]] * 4 + [[0, 1]] * 2 + [[1, 1]]),
        (3, [[1, 3], [0, 2], [2, 2]]),
        (6, [[2, 6], [2, 2]]),
    ):
        batches.clear()
        assert generate_with_edits(model, tokenizer, prompts, own, batch_size=batch_size) == expected
        assert batches == as_expected, "edits and rows; no edits are stacked for rows without any"
    monkeypatch.setattr("propmeta_edit.edits.views.free_memory", lambda device: 2 * 2 * 2 * size)
    batches.clear()
    assert generate_with_edits(model, tokenizer, prompts, own) == expected and [number for number, _ in batches] == [2, 2]
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        generate_with_edits(model, tokenizer, prompts, own, batch_size=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_finished_edits_wait_on_the_cpu(model, tokenizer):
    found = edit_many(model.cuda(), tokenizer, REQUESTS, hparams(), at_once=2)
    assert {value.device.type for edit in found for value in edit.weights.values()} == {"cpu"}
    with found[0].applied(model):
        expected = generate_greedily(model, tokenizer, ["Where?"])
    assert generate_with_edits(model, tokenizer, ["Where?"], found[:1]) == expected
    assert all(value.is_cuda for value in found[0].change().values())
    kept = edit_many(model, tokenizer, REQUESTS, hparams(), at_once=2, keep_on_device=True)
    assert {value.device.type for edit in kept for value in edit.weights.values()} == {"cuda"}
    assert all(torch.equal(kept[2].weights[name].cpu(), value) for name, value in found[2].weights.items())


@pytest.mark.parametrize(("keep", "expected"), [(False, "cpu"), (True, "cpu:0")])
def test_finished_edits_are_copied_from_the_device_unless_they_are_to_stay(model, tokenizer, monkeypatch, keep, expected):
    """A device with a number is another one, so the two can be told apart without a GPU."""
    went_to = set()

    def take(stack, number):
        return {name: SimpleNamespace(to=lambda device: went_to.add(device)) for name in stack.parameters}

    monkeypatch.setattr(type(model), "device", property(lambda model: torch.device("cpu:0")))
    monkeypatch.setattr(StackedWeights, "take", take)
    edit_many(model, tokenizer, REQUESTS, hparams(), keep_on_device=keep)
    assert went_to == {torch.device(expected)}


def test_the_state_that_many_edits_share_is_looked_at_once(model, tokenizer, monkeypatch):
    looked_at = []
    right = identity._sums_of_bits
    monkeypatch.setattr(identity, "_sums_of_bits", lambda value: looked_at.append(value) or right(value))
    found = edit_many(model, tokenizer, REQUESTS, hparams(), at_once=2)
    assert len(found) == 3 and len(looked_at) == len(select_parameters(model, [1]))
    with torch.no_grad():
        next(iter(select_parameters(model, [1]).values()))[0] += 1.0
    for edit in found:
        with pytest.raises(ModelError, match="were written to since"):
            edit.change()


def test_a_base_that_loaded_edits_stand_on_is_hashed_once(model, edits, saved, tokenizer, monkeypatch, tmp_path):
    """Further uses, and further edits, compare fingerprints; what is written into the base is still noticed."""
    edits[1].save(tmp_path / "other")
    loaded = [Edit.load(saved), Edit.load(tmp_path / "other"), Edit.load(saved)]
    hashed = []
    monkeypatch.setattr(identity, "_HASHES", {})
    monkeypatch.setattr(identity, "hash_tensors", lambda tensors: hashed.append(tensors) or hash_tensors(tensors))
    expected = [EditedModel(model, edit).answer(tokenizer, ["Where?"])[0] for edit in edits[:2]]
    assert generate_with_edits(model, tokenizer, ["Where?"] * 3, loaded) == [*expected, expected[0]]
    for edit in loaded[:2]:
        for _ in range(2):
            EditedModel(model, edit)(torch.tensor([[5, 6]]))
    assert len(hashed) == 1

    parameter = next(iter(select_parameters(model, [1]).values()))
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[0] += 1.0
    for edit in loaded:
        for use in (lambda edit=edit: edit.apply(model), lambda edit=edit: generate_with_edits(model, tokenizer, ["A"], [edit])):
            with pytest.raises(ModelError, match="made on other weights"):
                use()
    with torch.no_grad():
        parameter.copy_(kept)
    with loaded[0].applied(model):
        assert len(hashed) == 2, "of the state that was refused"


def test_many_at_once_are_the_single_ones(model, edits, tokenizer):
    together = edit_many(model, tokenizer, REQUESTS, hparams(), at_once=2)
    for single, other in zip(edits, together, strict=False):
        assert single.requests == other.requests
        for name, value in single.weights.items():
            torch.testing.assert_close(other.weights[name], value, rtol=1e-5, atol=1e-7)
        with other.applied(model):
            pass


def test_what_many_at_once_refuse(model, tokenizer):
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigError, match=f"at_once must be a whole number of edits, 1 or more, .* got {wrong}"):
            edit_many(model, tokenizer, REQUESTS, hparams(), at_once=wrong)
    with pytest.raises(RequestError, match="request 2: target_new must be"):
        edit_many(model, tokenizer, [*REQUESTS[:2], {"prompt": "x"}], hparams())
    with pytest.raises(RequestError, match="request 1: expected a mapping"):
        edit_many(model, tokenizer, [REQUESTS[0], REQUESTS[1:]], hparams())
    assert edit_many(model, tokenizer, [], hparams()) == []


def test_settings_alone_make_the_edit_of_hyperparameters_that_hold_them(model, edits, tokenizer):
    model.config._name_or_path = "models/here"
    for found in (
        compute_edit(model, tokenizer, REQUESTS[0], hparams().edit),
        *edit_many(model, tokenizer, REQUESTS, hparams().edit),
    ):
        expected = next(edit for edit in edits if edit.requests == found.requests)
        assert (found.base_model, found.method, found.settings) == ("models/here", "MetaFT", expected.settings)
        assert expected.base_model == "tiny" and found.weights.keys() == expected.weights.keys()
        for name, value in expected.weights.items():
            torch.testing.assert_close(found.weights[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "compute", [lambda *a: compute_edit(*a[:2], REQUESTS[0], a[2]), lambda *a: edit_many(*a[:2], REQUESTS, a[2])]
)
def test_an_edit_that_diverged_is_refused_and_leaves_no_trace(model, tokenizer, compute):
    before, settings = values_of(model), hparams()
    settings.edit = replace(settings.edit, inner_lr=1e300)
    with pytest.raises(ModelError, match=r"the edit diverged: .* after 3 steps at rate 1e\+300; lower the rate"):
        compute(model, tokenizer, settings)
    assert same(values_of(model), before)


def test_every_module_is_in_the_mode_that_it_was_in(model, tokenizer):
    model.train()
    get_blocks(model)[0].eval()
    modes = [module.training for module in model.modules()]
    compute_edit(model, tokenizer, REQUESTS[0], hparams())
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


def test_as_many_at_once_as_the_memory_allows(model, edits, tokenizer, monkeypatch):
    edited = edits[0].weights
    size = sum(value.nbytes for value in edited.values())
    largest = max(value.nbytes for value in edited.values())
    each = 2 * (4 * size + largest)  # its weights, two moments, one gradient, a result; half of the memory is for texts
    settings = hparams().edit
    assert [choose_at_once(edited, settings, n) for n in (0, each - 1, 2 * each - 1, 2 * each, 1000 * each)] == [1, 1, 1, 2, 64]
    asked = []
    monkeypatch.setattr("propmeta_edit.edits.compute.free_memory", lambda device: asked.append(device) or 2 * each)
    found = edit_many(model, tokenizer, REQUESTS, hparams())
    assert asked == [model.device] and len(found) == len(REQUESTS)
    assert free_memory(model.device) > 0


def test_facts_of_one_length_are_learnt_side_by_side_and_come_back_in_their_order(model, tokenizer, monkeypatch):
    """Four edits, two at once: the short ones together and the long ones."""
    long = [
        EditRequest(f"The capital of the country in which {name} was born and lives is", "Lima in Peru") for name in ("Ann", "Bob")
    ]
    requests = [REQUESTS[0], long[0], EditRequest("Bob Day lives in", "Peru", "Bob Day"), long[1]]
    seen, learn = [], compute.learnt_edits
    monkeypatch.setattr(
        compute, "learnt_edits", lambda *given: seen.append([request.prompt for [request] in given[2]]) or learn(*given)
    )
    found = edit_many(model, tokenizer, requests, hparams(), at_once=2)
    assert [set(prompts) for prompts in seen] == [{requests[0].prompt, requests[2].prompt}, {one.prompt for one in long}]
    assert [edit.requests for edit in found] == [(request,) for request in requests]
    alone = compute_edit(model, tokenizer, long[0], hparams())
    for name, value in alone.weights.items():
        torch.testing.assert_close(found[1].weights[name], value, rtol=1e-3, atol=1e-4)


def test_more_edits_of_low_rank_fit_into_the_same_memory():
    """Their factors, and as much again where results stay on the device."""
    edited = {"mlp.up.weight": torch.zeros(400, 300), "mlp.up.bias": torch.zeros(400), "mlp.down.weight": torch.zeros(300, 400)}
    settings = EditSettings([0], num_inner_steps=5, inner_step="whitened", positions="subject")
    factors = 4 * 5 * 3 * 2 * 700
    free = 2 * 3 * factors
    assert choose_at_once(edited, settings, free, keeps_results=False) == 3
    assert choose_at_once(edited, settings, 2 * free) == 3
    assert choose_at_once(edited, EditSettings([0]), free) == 1


def test_an_edit_from_what_another_method_returned(model, tokenizer):
    parameters = dict(model.named_parameters())
    names = list(select_parameters(model, [0, 2], "mlp"))
    original = {name: parameters[name].detach().clone() for name in names}
    before = values_of(model)
    with torch.no_grad():
        for name in names[:2]:
            parameters[name] += 0.1
    edited = logits(model)
    mapping = {"prompt": REQUESTS[0].prompt, "target_new": REQUESTS[0].target_new, "subject": REQUESTS[0].subject}
    edit = edit_from_weights(model, original, [mapping], method="ROME", base_model="tiny")
    assert edit.requests == (REQUESTS[0],)
    assert same(values_of(model), before) and set(edit.weights) == set(names[:2]), "what did not move is not part of it"
    with edit.applied(model):
        assert torch.equal(logits(model), edited)


def test_weights_that_were_put_back_are_no_edit(model):
    """What EasyEdit's editors return after an edit that they have taken out again."""
    name = next(iter(select_parameters(model, [1])))
    with pytest.raises(RequestError, match="no request"):
        edit_from_weights(model, {}, [], method="ROME")
    same_as_now = {name: model.get_parameter(name).detach().clone()}
    for original in (same_as_now, {}):
        with pytest.raises(ModelError, match=r"there is no edit in this model: none of the \d tensors .*sequential_edit=True"):
            edit_from_weights(model, original, REQUESTS[:1], method="ROME")


def test_taking_out_what_another_method_wrote_is_said(model, tokenizer, edits, caplog):
    """What stands on an edit and is no ``Edit`` itself cannot be kept without it."""
    before, name = values_of(model), next(iter(edits[0].weights))
    for write in (
        lambda: put_in_place({name: model.get_parameter(name)}, {name: model.get_parameter(name).data + 0.1}),
        lambda: model.get_parameter(name).data.add_(0.1),
    ):
        caplog.clear()
        edits[0].apply(model)
        edits[3].apply(model)
        write()
        edits[3].undo(model)
        assert not caplog.records, "of other tensors"
        edits[0].undo(model)
        assert same(values_of(model), before)
        [record] = caplog.records
        assert f"1 tensors were written to while an edit stood in them ({name})" in record.getMessage()
    caplog.clear()
    for edit in edits:
        edit.apply(model)
    for edit in edits:
        edit.undo(model)
    assert not caplog.records


def test_writing_in_place_into_a_standing_edit_does_not_reach_it(model, edits, tmp_path):
    """Neither what it holds, nor what it saves, nor the weights of before."""
    before, kept = values_of(model), {name: value.clone() for name, value in edits[0].weights.items()}
    edits[0].apply(model)
    with torch.no_grad():
        for name in kept:
            model.get_parameter(name).add_(0.1)
    assert same(edits[0].weights, kept)
    edits[0].save(tmp_path / "edit")
    edits[0].undo(model)
    assert same(values_of(model), before)
    loaded = Edit.load(tmp_path / "edit")
    assert same(loaded.weights, kept)
    with edits[0].applied(model), torch.no_grad():
        model.get_parameter(name).add_(0.1)
    assert same(edits[0].weights, kept) and same(values_of(model), before)


@pytest.mark.parametrize("loaded", [False, True])
def test_merged_edits_are_those_that_stand_together(model, tokenizer, edits, loaded, tmp_path):
    of_layer_1, of_layer_2 = edits[0], edits[3]
    if loaded:
        for number, edit in enumerate(edits):
            edit.save(tmp_path / str(number))
        edits = [Edit.load(tmp_path / str(number)) for number in range(4)]
    before = values_of(model)
    disjoint = merge_edits(model, [edits[0], edits[3]])
    assert all(
        torch.equal(disjoint.weights[name], value) for edit in (of_layer_1, of_layer_2) for name, value in edit.weights.items()
    )
    assert disjoint.requests == edits[0].requests + edits[3].requests and disjoint.method == "MetaFT"
    assert disjoint.settings == {"merged": [dict(edits[0].settings), dict(edits[3].settings)]}
    merged = merge_edits(model, edits)
    assert same(values_of(model), before) and standing_edits(model) == [] and merged.settings != edits[0].settings
    for edit in edits:
        edit.apply(model)
    together = values_of(model)
    for edit in edits:
        edit.undo(model)
    merged.save(tmp_path / "merged")
    for one in (merged, Edit.load(tmp_path / "merged")):
        with one.applied(model):
            assert same(values_of(model), together)
    of_one_layer = merge_edits(model, edits[:2])
    assert of_one_layer.settings == edits[0].settings
    first, second = edits[0].change(model), edits[1].change(model)
    for name, value in of_one_layer.change(model).items():
        torch.testing.assert_close(value, first[name] + second[name], rtol=1e-9, atol=1e-12)


def test_what_cannot_be_merged(model, tokenizer, edits, relative):
    for several, message in (([], "nothing to merge"), ([edits[0], edits[0]], "stands in the model already")):
        with pytest.raises(ModelError, match=message):
            merge_edits(model, several)
    with pytest.raises(ModelError, match="made on another model"):
        merge_edits(relative[0], edits[:2])
    with edits[0].applied(model):
        on_top = compute_edit(model, tokenizer, REQUESTS[1], hparams())
    merged = merge_edits(model, [edits[0], on_top])
    assert same(merged.weights, on_top.weights) and standing_edits(model) == []
    with merged.applied(model), pytest.raises(ModelError, match="made on other weights"):
        merge_edits(model, [on_top])


def test_a_method_that_writes_in_place_harms_no_other_edit(model, tokenizer, edits):
    """As EasyEdit's editors do: with another edit standing, and with none."""
    before, a = values_of(model), edits[0]
    kept = {name: value.clone() for name, value in a.weights.items()}
    name = next(iter(a.weights))
    parameter = dict(model.named_parameters())[name]
    for stands in (True, False):
        if stands:
            a.apply(model)
        original = {name: parameter.detach().clone()}
        with torch.no_grad():
            parameter[...] += 0.1
        b = edit_from_weights(model, original, REQUESTS[1:2], method="ROME")
        with b.applied(model):
            torch.testing.assert_close(parameter.data, original[name] + 0.1)
        if stands:
            a.undo(model)
        assert same(a.weights, kept) and same(values_of(model), before)
        a.change()


def test_rows_refuse_edits_of_another_state(model, edits, tokenizer, family):
    with edits[1].applied(model), pytest.raises(ModelError, match=r"made on other weights .* than this model has now"):
        generate_with_edits(model, tokenizer, ["Where?"], [edits[0]])
    with pytest.raises(ModelError, match="made on other weights"):
        generate_with_edits(tiny.make_model(family, seed=1), tokenizer, ["Where?"], [edits[0]])
    norm = next(name for name, p in model.named_parameters() if p.dim() == 1 and ("norm" in name or "ln_" in name))
    parameters = dict(model.named_parameters())
    original = {norm: parameters[norm].detach().clone()}
    with torch.no_grad():
        parameters[norm] += 1
    edit = edit_from_weights(model, original, REQUESTS[:1], method="FT")
    with pytest.raises(ModelError, match="rows can differ in projections alone"):
        generate_with_edits(model, tokenizer, ["Where?"], [edit])


def test_a_bias_alone_can_differ_by_row(tokenizer):
    model = tiny.make_model("gpt2")
    parameters = dict(model.named_parameters())
    name = "transformer.h.1.mlp.c_fc.bias"
    original = {name: parameters[name].detach().clone()}
    with torch.no_grad():
        parameters[name] += torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(0)) * 5
    edit = edit_from_weights(model, original, REQUESTS[:1], method="FT")
    with edit.applied(model):
        expected = generate_greedily(model, tokenizer, ["Where?"])
    plain = generate_greedily(model, tokenizer, ["Where?"])
    assert generate_with_edits(model, tokenizer, ["Where?", "Where?"], [edit, None]) == [*expected, *plain] and expected != plain


def test_a_lora_of_gpt2s_transposed_weights(tokenizer, tmp_path):
    from peft import PeftModel

    model = tiny.make_model("gpt2")
    parameters = dict(model.named_parameters())
    name = "transformer.h.1.mlp.c_proj.weight"
    original = {name: parameters[name].detach().clone()}
    with torch.no_grad():
        parameters[name] += 0.1 * torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(0))
    edited = logits(model)
    edit = edit_from_weights(model, original, REQUESTS[:1], method="ROME")
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").save_lora(tmp_path / "lora", 16, model) == pytest.approx(0, abs=1e-6)
    adapted = PeftModel.from_pretrained(tiny.make_model("gpt2"), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-4, atol=1e-5)


def test_many_edits_refuse_half_precision_too(tokenizer):
    with pytest.raises(ModelError, match="must be fp32"):
        edit_many(tiny.make_model("llama").bfloat16(), tokenizer, REQUESTS, hparams())


def test_several_requests_are_one_edit_and_mappings_serve(model, tokenizer):
    rows = [{"prompt": r.prompt, "target_new": r.target_new} for r in REQUESTS]
    edit = compute_edit(model, tokenizer, rows, hparams())
    assert [request.target_new for request in edit.requests] == ["Peru", "Greece", "Lima in Peru"]
    with pytest.raises(RequestError, match="request 0: target_new must be"):
        compute_edit(model, tokenizer, {"prompt": "x"}, hparams())
    with pytest.raises(RequestError, match="no request"):
        compute_edit(model, tokenizer, [], hparams())


def test_fingerprints_and_hashes_tell_tensors_apart():
    one = torch.randn(5, 7)
    other = one.clone()
    assert take_fingerprint(one) == take_fingerprint(other) and hash_tensors({"a": one}) == hash_tensors({"a": other})
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(10.0))
    assert take_fingerprint(one) != take_fingerprint(other) and hash_tensors({"a": one}) != hash_tensors({"a": other})
    assert take_fingerprint(one) != take_fingerprint(one.flip(0)) != take_fingerprint(one.bfloat16())


def test_an_identity_looks_at_every_tensor(model):
    """At a share of a large one, in every column; a tensor that is given counts instead of the model's."""
    known = take_identity(model, {})
    for name, parameter in model.named_parameters():
        replaced = {name: parameter.detach() * 1.02 + 0.02}
        found = take_identity(model, replaced)
        assert [n for n in known if known[n] != found[n]] == [name]
    large = torch.nn.Linear(576, 1536, bias=False)
    before = take_identity(large, {})
    for column in (0, 7, 300):
        changed = large.weight.detach().clone()
        changed[:, column] += 1
        assert take_identity(large, {"weight": changed}) != before
    assert take_identity(large, {"weight": large.weight.detach().bfloat16()}) == before


def test_a_request_that_cannot_be_written_is_named_by_its_number_before_any_is(model, tokenizer, monkeypatch):
    """Whichever of several groups it is in."""
    requests = [EditRequest(f"Ann {n} is", "Greek") for n in range(4)] + [EditRequest("x" * tiny.POSITIONS, "y")]
    monkeypatch.setattr("propmeta_edit.edits.compute.learnt_edits", lambda *arguments: pytest.fail("an edit was written"))
    for at_once in (1, 2, 8):
        with pytest.raises(RequestError, match=rf"^request 4: the text .* but the model has {tiny.POSITIONS} positions"):
            edit_many(model, tokenizer, requests, hparams(), at_once=at_once)


def test_a_base_that_was_rounded_while_loading_is_refused_with_the_reason(model, tokenizer, tmp_path):
    compute_edit(model, tokenizer, REQUESTS[0], hparams()).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    with pytest.raises(ModelError, match=r"is torch\.bfloat16 here and torch\.float64 in the edit, and so was rounded"):
        edit.apply(model.to(torch.bfloat16))


def test_the_configuration_of_an_edit_is_for_people_and_older_ones_are_read(model, tokenizer, tmp_path):
    compute_edit(model, tokenizer, REQUESTS[0], hparams()).save(tmp_path / "edit")
    config = json.loads((tmp_path / "edit" / "edit_config.json").read_text())
    base = read_base(tmp_path / "edit" / "edit_model.safetensors")["base"]
    assert "base" not in config and base == take_base(model)
    save_file(load_file(tmp_path / "edit" / "edit_model.safetensors"), tmp_path / "edit" / "edit_model.safetensors")
    with pytest.raises(ModelError, match=r"is damaged \('base'\)"):
        Edit.load(tmp_path / "edit")
    (tmp_path / "edit" / "edit_config.json").write_text(json.dumps({**config, "base": base}))  # as it was written before
    with Edit.load(tmp_path / "edit").applied(model):
        pass
