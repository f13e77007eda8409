"""Loading: fp32 where it is edited, to the bit, whatever the rest is."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.edits.edit import Edit
from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.metatrain import checkpoint as checkpoint_module
from propmeta_edit.metatrain.checkpoint import TRAINED, export_checkpoint, export_compact, save_checkpoint
from propmeta_edit.metatrain.run import Progress, TaskLosses
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import DTYPES, load_model, model_sha256, read_checkpoint_card, read_tensors


@pytest.fixture
def checkpoint(family, tokenizer, tmp_path):
    """A meta-tuned folder whose layer 1 holds values that bf16 cannot."""
    model = tiny.make_model(family, dtype=torch.float32)
    trained = select_parameters(model, [1])
    card = {"base_model": "tiny", "trained_tensors": list(trained), "settings": {"inner_lr": 2e-5}, "num_tasks": 1}
    save_checkpoint(tmp_path / "any-folder-name", model, tokenizer, card, Progress([TaskLosses("t", 1.0, 2.0)]))
    return tmp_path / "any-folder-name", model


def test_edited_tensors_keep_their_bits_in_a_bf16_model(checkpoint, tokenizer):
    folder, original = checkpoint
    model, loaded_tokenizer = load_model(str(folder), dtype="bfloat16", layers=[0])
    exact = dict(original.named_parameters())
    fp32 = set(select_parameters(original, [0])) | set(select_parameters(original, [1]))
    for name, parameter in model.named_parameters():
        if name in fp32:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, exact[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    embedding = original.get_input_embeddings().weight
    assert not torch.equal(embedding, embedding.bfloat16().float())
    assert loaded_tokenizer.padding_side == "left" and loaded_tokenizer.pad_token_id is not None
    ids = torch.tensor([tokenizer("Ann Lee is a citizen of")["input_ids"]])
    with torch.no_grad():
        close = (model(ids).logits.float() - original(ids).logits).abs().max() / original(ids).logits.abs().max()
    assert close < 0.05  # bf16 keeps about 2 to 3 digits through three random layers


def test_a_plain_fp32_load_is_exact(checkpoint):
    folder, original = checkpoint
    model, _ = load_model(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_saving_an_fp32_layer_inside_bf16_round_trips(checkpoint, tokenizer, tmp_path):
    folder, original = checkpoint
    model, _ = load_model(str(folder), dtype="bfloat16", layers=[1])
    card = json.loads((folder / "metaft.json").read_text())
    save_checkpoint(tmp_path / "again", model, tokenizer, card, Progress())
    again, _ = load_model(str(tmp_path / "again"), dtype="bfloat16", layers=[1])
    for name, parameter in select_parameters(again, [1]).items():
        assert torch.equal(parameter, dict(original.named_parameters())[name])


def test_export_says_what_rounding_costs(checkpoint, tmp_path):
    folder, original = checkpoint
    cost = export_checkpoint(str(folder), tmp_path / "bf16", "bfloat16")
    values = torch.cat([p.detach().flatten() for p in select_parameters(original, [1]).values()])
    error = values.bfloat16().float() - values
    assert cost["max_abs_error"] == pytest.approx(error.abs().max().item(), rel=1e-6) and error.abs().max() > 0
    assert cost["relative_error"] == pytest.approx((error.norm() / values.norm()).item(), rel=1e-4)
    card = json.loads((tmp_path / "bf16" / "metaft.json").read_text())
    assert card["rounding"] == cost and card["exported_dtype"] == "bfloat16"
    with pytest.raises(ModelError, match="exists"):
        export_checkpoint(str(folder), tmp_path / "bf16", "bfloat16")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_export_rounds_once_and_does_not_hold_the_frozen_rest_in_fp32(checkpoint, tmp_path, monkeypatch, stored, dtype):
    """The same files as by way of the whole model in fp32."""
    first, _ = checkpoint
    card = read_checkpoint_card(first)
    save_checkpoint(tmp_path / "stored", *load_model(str(first), dtype=stored), card, Progress())
    folder = tmp_path / "stored"
    model, tokenizer = load_model(str(folder))
    save_checkpoint(tmp_path / "expected", model.to(DTYPES[dtype]), tokenizer, card, Progress())
    dtypes = {}

    def load(*arguments, **values):
        loaded = load_model(*arguments, **values)
        dtypes.update({name: p.dtype for name, p in loaded[0].named_parameters()})
        return loaded

    monkeypatch.setattr(checkpoint_module, "load_model", load)
    export_checkpoint(str(folder), tmp_path / "exported", dtype)
    in_fp32 = {*card["trained_tensors"], *select_parameters(model, None)}  # load_model's default layer as well
    assert dtypes == {name: torch.float32 if name in in_fp32 else DTYPES[dtype] for name in dtypes}
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_compact_export_reads_the_trained_tensors_alone(checkpoint, tmp_path, monkeypatch):
    folder, original = checkpoint
    monkeypatch.setattr(checkpoint_module, "load_model", lambda *_, **__: pytest.fail("the whole model was loaded"))
    size = export_compact(str(folder), tmp_path / "compact")
    expected = select_parameters(original, [1])
    found = load_file(tmp_path / "compact" / TRAINED)
    assert size == sum(value.nbytes for value in found.values()) and found.keys() == expected.keys()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], value) for name, value in expected.items())


def test_compact_export_of_rounded_tensors_is_in_fp32(checkpoint, tmp_path):
    folder, original = checkpoint
    export_checkpoint(str(folder), tmp_path / "half", "bfloat16")
    export_compact(str(tmp_path / "half"), tmp_path / "compact")
    for name, value in load_file(tmp_path / "compact" / TRAINED).items():
        assert value.dtype == torch.float32 and torch.equal(value, original.get_parameter(name).bfloat16().float())


def test_compact_export_of_a_damaged_folder(checkpoint, tmp_path):
    folder, _ = checkpoint
    with pytest.raises(ModelError, match="1 tensors that are needed are not in the safetensors files of"):
        read_tensors(folder, {"no.such.weight"})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read tensors from .*model\.safetensors"):
        export_compact(str(folder), tmp_path / "compact")
    assert not (tmp_path / "compact").exists()


def test_weights_of_another_architecture_are_refused(checkpoint):
    folder, _ = checkpoint
    file = folder / "model.safetensors"
    weights = load_file(file)
    dropped = next(name for name in weights if ".1." in name)
    save_file({name: value for name, value in weights.items() if name != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not those of its config\.json"):
        load_model(str(folder))


def test_a_missing_head_is_refused_where_it_is_not_the_embedding(checkpoint):
    folder, original = checkpoint
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "lm_head.weight"}, file, metadata={"format": "pt"})
    if original.config.tie_word_embeddings:
        assert torch.equal(load_model(str(folder))[0].lm_head.weight, original.lm_head.weight)
        return
    with pytest.raises(ModelError, match=r"not those of its config\.json .*lm_head\.weight"):
        load_model(str(folder))


def test_a_folder_that_is_to_come_is_not_looked_for_on_the_hub_unsaid(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"no folder 'checkpoints/mine' here .* is written \./checkpoints/mine"):
        load_model("checkpoints/mine")


@pytest.mark.parametrize("damage", ["no weights", "truncated weights", "no config"])
def test_damaged_folders_are_refused(checkpoint, damage):
    folder, _ = checkpoint
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "truncated weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot load a model from"):
        load_model(str(folder))


def test_pickled_weights_are_refused(checkpoint):
    folder, original = checkpoint
    (folder / "model.safetensors").unlink()
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load a model from"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["smollm3", "gpt2-xl", "./nowhere", "", "a/b/c"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ModelError, match="smollm2-135m, smollm2-135m-metaft"):
        load_model(name)


def test_layer_outside_and_dtype(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(ModelError, match="layer 9 is outside the model"):
        load_model(str(folder), layers=[9])
    with pytest.raises(ModelError, match="float32, bfloat16, float16, auto, got 'int8'"):
        load_model(str(folder), dtype="int8")
    shutil.rmtree(folder)


@pytest.fixture
def half_checkpoint(tmp_path, tokenizer):
    """Of a base that is stored in bf16, with trained tensors that bf16 would round."""
    base = tiny.make_model("llama", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "half-base")
    tokenizer.save_pretrained(tmp_path / "half-base")
    model, _ = load_model(str(tmp_path / "half-base"), dtype="auto", layers=[1])
    trained = select_parameters(model, [1])
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 1e-5 * torch.randn_like(parameter)
    sums = {"base_model": str(tmp_path / "half-base"), "base_sha256": model_sha256(tmp_path / "half-base")}
    card = {**sums, "trained_tensors": list(trained), "settings": {"layers": [1], "modules": "attention+mlp"}}
    save_checkpoint(tmp_path / "half", model, tokenizer, card, Progress())
    return tmp_path / "half", model


def test_transformers_alone_rounds_no_trained_tensor_of_a_half_precision_base(half_checkpoint):
    folder, original = half_checkpoint
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(plain.get_parameter(name), p.float()) for name, p in original.named_parameters())


def test_an_edit_of_such_a_checkpoint_stands_in_what_transformers_loads(half_checkpoint, tokenizer, tmp_path):
    folder, _ = half_checkpoint
    model, _ = load_model(str(folder), dtype="bfloat16")
    settings = EditSettings(layers=[1], inner_lr=0.01, num_inner_steps=2)
    compute_edit(model, tokenizer, {"prompt": "Ann Lee lives in", "target_new": "Peru"}, settings).save(tmp_path / "edit")
    edit, plain = Edit.load(tmp_path / "edit"), AutoModelForCausalLM.from_pretrained(folder)
    with edit.applied(plain):
        assert all(torch.equal(plain.get_parameter(name), value) for name, value in edit.weights.items())
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    with pytest.raises(ModelError, match=r"bfloat16 here and torch\.float32 in the edit, .* dtype=\"float32\""):
        edit.apply(rounded)


def test_a_mixed_folder_is_loaded_as_it_is_stored_where_auto_is_asked(half_checkpoint):
    folder, original = half_checkpoint
    again, _ = load_model(str(folder), dtype="auto", layers=[])
    for name, parameter in original.named_parameters():
        found = again.get_parameter(name)
        assert found.dtype == parameter.dtype and torch.equal(found, parameter), name
