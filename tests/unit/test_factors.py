"""Factors in place of matrices: the same loops on less, a checkpoint and an edit that PEFT loads, and the old bits outside."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from propmeta_edit import Edit, MetaFTHyperParams, apply_metaft_to_model, compute_edit
from propmeta_edit.easyedit.hparams import edit_settings_of
from propmeta_edit.edits.compute import edit_many
from propmeta_edit.edits.views import EditedModel
from propmeta_edit.errors import ConfigError, ModelError, OriginError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.factors import attach_factors
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, read_checkpoint_card
from propmeta_edit.recipes.meta_training import train_to_folder
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

REQUESTS = [EditRequest("Ann Lee lives in", "Peru"), EditRequest("Smith Innovation PLC was founded in", "Greece")]
SETTINGS = EditSettings(layers=[1], inner_lr=0.02, num_inner_steps=4)
TEXTS = ["Ann Lee lives in", "The capital of Peru is"]


def make_model(architecture, rank=3):
    model = tiny.make_model(architecture, dtype=torch.float32)
    attach_factors(model, [0, 1], "attention+mlp", rank)
    return model


def bits_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logits_of(model, tokenizer):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3_text"])
def test_fresh_factors_change_nothing_and_are_what_is_moved(tokenizer, architecture):
    plain = tiny.make_model(architecture, dtype=torch.float32)
    model = make_model(architecture)
    assert torch.equal(logits_of(model, tokenizer), logits_of(plain, tokenizer))
    chosen = select_parameters(model, [1], "mlp")
    assert chosen and all(".lora_" in name and ".1.mlp." in name and p.dtype == torch.float32 for name, p in chosen.items())
    assert {tuple(p.shape)[name.count("lora_B")] for name, p in chosen.items()} == {3}
    before = bits_of(model)
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in bits_of(model).items())
    [batch] = encode_requests(TextEncoder(tokenizer), [REQUESTS[:1]])
    unedited = float(compute_answer_loss(model, batch))
    with edit.applied(model):
        moved = {name for name, value in bits_of(model).items() if not torch.equal(value, before[name])}
        assert float(compute_answer_loss(model, batch)) < unedited - 0.1
    assert moved == set(select_parameters(model, [1]))
    assert sum(value.nbytes for value in edit.weights.values()) < sum(p.nbytes for p in select_parameters(plain, [1]).values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loop_on_factors_is_adamw_on_their_gradients(tokenizer, architecture):
    model, other = make_model(architecture), make_model(architecture)
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    parameters = select_parameters(other, [1])
    optimizer = torch.optim.AdamW(parameters.values(), lr=SETTINGS.inner_lr, weight_decay=SETTINGS.weight_decay)
    [batch] = encode_requests(TextEncoder(tokenizer), [REQUESTS[:1]])
    for _ in range(SETTINGS.num_inner_steps):
        optimizer.zero_grad()
        compute_answer_loss(other, batch).sum().backward()
        optimizer.step()
    for name, value in edit.weights.items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-3, atol=1e-4)


def test_edits_side_by_side_are_those_one_by_one(tokenizer):
    model = make_model("llama").double()
    together = edit_many(model, tokenizer, REQUESTS, SETTINGS, at_once=2)
    for request, edit in zip(REQUESTS, together, strict=True):
        alone = compute_edit(model, tokenizer, request, SETTINGS)
        for name, value in alone.weights.items():
            torch.testing.assert_close(edit.weights[name], value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_are_fp32_in_a_bf16_model(tokenizer, architecture):
    """As meta-training on a GPU has them; alone and side by side."""
    model = tiny.make_model(architecture, dtype=torch.bfloat16)
    attach_factors(model, [0, 1], "attention+mlp", 3)
    alone = [compute_edit(model, tokenizer, request, SETTINGS) for request in REQUESTS]
    together = edit_many(model, tokenizer, REQUESTS, SETTINGS, at_once=2)
    for edit in (*alone, *together):
        assert all(value.dtype == torch.float32 and value.abs().max() > 0 for value in edit.weights.values())
        assert edit.learning.last < edit.learning.before


@pytest.fixture
def base(tokenizer, tmp_path):
    return tiny.save_model_folder(tmp_path / "base", tokenizer)


@pytest.fixture
def tuned(base, tmp_path):
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 12))
    small = {"layers": [1], "inner_lr": 0.02, "num_inner_steps": 2, "device": "cpu", "num_tasks": 3, "rank": 3}
    config = MetaTrainConfig(str(base), str(data), outer_lr=0.01, **small)
    train_to_folder(config, tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_checkpoint_is_a_lora_on_the_untouched_base(base, tuned, tokenizer):
    assert sum(file.stat().st_size for file in tuned.glob("*.safetensors")) < (base / "model.safetensors").stat().st_size / 3
    stored = load_file(tuned / "adapter_model.safetensors")
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in stored.items()), "meta-training moved it"
    ours, _ = load_model(str(tuned))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), tuned).eval()
    torch.testing.assert_close(logits_of(ours, tokenizer), logits_of(theirs, tokenizer))
    assert not torch.equal(logits_of(ours, tokenizer), logits_of(load_model(str(base))[0], tokenizer))
    card = read_checkpoint_card(tuned)
    assert card["base_model"] == str(base) and set(card["trained_tensors"]) == set(select_parameters(ours, [1]))


def test_it_is_edited_through_easyedits_convention_saved_and_loaded(tuned, tokenizer, tmp_path):
    hparams = MetaFTHyperParams(model_name=str(tuned), device="cpu", **edit_settings_of(read_checkpoint_card(tuned)["settings"]))
    model, tokenizer = hparams.load_model()
    before = bits_of(model)
    edit = compute_edit(model, tokenizer, REQUESTS[0], hparams)
    edited, original = apply_metaft_to_model(
        model, tokenizer, [{"prompt": REQUESTS[0].prompt, "target_new": "Peru"}], hparams, return_orig_weights=True
    )
    assert all(torch.equal(edited.get_parameter(name), value) for name, value in edit.weights.items())
    for name, value in original.items():
        edited.get_parameter(name).data.copy_(value)
    assert all(torch.equal(value, before[name]) for name, value in bits_of(edited).items())
    edit.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    texts = ["Ann Lee lives in"]
    assert EditedModel(model, again).answer(tokenizer, texts) == EditedModel(model, edit).answer(tokenizer, texts)


def test_training_goes_on_from_a_checkpoint_of_factors(tuned, base, tmp_path):
    config = MetaTrainConfig(**{**read_checkpoint_card(tuned)["settings"], "model": str(tuned), "rank": None})
    train_to_folder(config, tmp_path / "further")
    card = read_checkpoint_card(tmp_path / "further")
    assert card["base_model"] == str(base) and card["base_sha256"] == read_checkpoint_card(tuned)["base_sha256"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tuned, tmp_path / "further"))
    assert first.keys() == second.keys() and not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_is_itself_a_lora_on_the_base(tokenizer, tmp_path, architecture):
    """Exactly: on the base, the product of its factors is the whole of what checkpoint and edit changed."""
    model, plain = make_model(architecture), tiny.make_model(architecture, dtype=torch.float32)
    edit = compute_edit(model, tokenizer, REQUESTS[0], replace(SETTINGS, layers=[0, 1]))
    assert edit.save_lora(tmp_path / "lora", rank=3) == 0.0
    with edit.applied(model):
        expected = logits_of(model, tokenizer)
    found = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    torch.testing.assert_close(logits_of(found, tokenizer), expected)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 3
    found.load_adapter(tmp_path / "lora", "twin")
    found.add_weighted_adapter(["default", "twin"], [0.5, 0.5], "both", combination_type="cat")
    found.set_adapter("both")
    torch.testing.assert_close(logits_of(found, tokenizer), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused(tokenizer, tuned, base):
    model = make_model("llama")
    with pytest.raises(ModelError, match="the model has factors already"):
        attach_factors(model, [1], "mlp", 2)
    with pytest.raises(ModelError, match=r"layer 2 has no factors in its attention; those there are are in model\.layers\.0"):
        select_parameters(model, [2])
    with pytest.raises(ConfigError, match="rank must be a whole number, 1 or more, got 0"):
        attach_factors(tiny.make_model("llama"), [1], "mlp", 0)
    with pytest.raises(ModelError, match="are of rank 3, and rank says 2; leave rank out"):
        load_model(str(tuned), rank=2)
    for values in ({"shard": True}, {"inner_step": "whitened"}):
        with pytest.raises(ConfigError, match="rank cannot be combined"):
            MetaTrainConfig("tiny", rank=2, **values)
    (tuned / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"the factors in .* cannot be put into this model"):
        load_model(str(tuned))
    weights = next(iter(base.glob("*.safetensors")))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OriginError, match="was meta-trained from other weights"):
        load_model(str(tuned))
