"""Second moments of the keys against the obvious sum, continued runs, and the files EasyEdit reads."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from propmeta_edit import MetaFTHyperParams, compute_edit
from propmeta_edit.baselines import second_moments
from propmeta_edit.baselines.second_moments import (
    collect_second_moments,
    read_second_moment,
    statistics_file,
    write_statistics,
)
from propmeta_edit.easyedit.hparams import edit_settings_of
from propmeta_edit.errors import ModelError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.layers import get_architecture, key_module_name
from propmeta_edit.models.loading import load_model, read_checkpoint_card
from propmeta_edit.recipes import statistics
from propmeta_edit.recipes.meta_training import train_to_folder

TEXTS = [f"Ann {'Lee ' * (n % 7)}was founded in {['Greece', 'Peru', 'Lima'][n % 3]}." for n in range(230)]


def test_all_layers_in_one_pass_are_the_obvious_sums(family, tokenizer):
    model = tiny.make_model(family)
    moments = collect_second_moments(model, tokenizer, TEXTS, [0, 2], batch_tokens=64)
    keys = {name: [] for name in moments.sums}
    for name in keys:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: keys[name].append(inputs[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    assert list(moments.sums) == [key_module_name(get_architecture(model), layer) for layer in (0, 2)]
    for name, seen in keys.items():
        flat = torch.cat(seen)
        assert moments.num_tokens == len(flat) and moments.num_texts == len(TEXTS)
        torch.testing.assert_close(moments.moment(name).double(), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6)


def test_long_texts_are_cut(tokenizer):
    model = tiny.make_model("llama")
    moments = collect_second_moments(model, tokenizer, TEXTS[:3], [1], max_length=4)
    assert moments.num_tokens == 12


def test_a_run_that_was_stopped_continues_to_the_same_bits(tokenizer, tmp_path, monkeypatch):
    model, state = tiny.make_model("llama"), tmp_path / "state.safetensors"
    whole = collect_second_moments(model, tokenizer, TEXTS, [0, 1])
    calls = []

    def stop_in_the_last_window(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return batches(*arguments)

    batches = second_moments._batches
    monkeypatch.setattr(second_moments, "_batches", stop_in_the_last_window)
    with pytest.raises(KeyboardInterrupt):
        collect_second_moments(model, tokenizer, TEXTS, [0, 1], state_file=state, save_every=100)
    with pytest.raises(ModelError, match="another model, other texts or settings"):
        collect_second_moments(model, tokenizer, TEXTS[:-1], [0, 1], state_file=state)
    with pytest.raises(ModelError, match="another model, other texts or settings"):
        collect_second_moments(model, tokenizer, TEXTS, [0, 1], state_file=state, model_id="another")
    calls.clear()
    continued = collect_second_moments(model, tokenizer, TEXTS, [0, 1], state_file=state, save_every=100)
    assert len(calls) == 1, "two of three windows came from the state"
    assert continued.num_tokens == whole.num_tokens and not state.exists()
    for name, total in whole.sums.items():
        assert torch.equal(total, continued.sums[name])


def test_files_round_trip_and_bad_ones_are_named(tokenizer, tmp_path):
    moments = collect_second_moments(tiny.make_model("gpt2"), tokenizer, TEXTS[:5], [1])
    [file] = write_statistics(moments, tmp_path, "gpt2-tiny", "sampled")
    assert file == tmp_path / "gpt2-tiny" / "sampled_stats" / "transformer.h.1.mlp.c_proj_float32_mom2_5.npz"
    assert torch.equal(read_second_moment(file), moments.moment("transformer.h.1.mlp.c_proj"))
    file.write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="no file of second moments"):
        read_second_moment(file)
    with pytest.raises(ModelError, match="propmeta-edit statistics"):
        read_second_moment(statistics_file(tmp_path, "other", "sampled", "m", 5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_are_added_in_place_where_a_product_would_be_as_large_as_the_sum(device):
    """On the CPU, whose bits shipped files rest on, the product comes first; elsewhere nothing as large as the sum is made."""
    total, keys = torch.zeros(64, 64, device=device), torch.ones(5, 64, device=device)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            made.append(function._schema.name)
            return function(*arguments, **(keywords or {}))

    with Watch():
        second_moments._add_keys(total, keys)
    assert ("aten::addmm_" in made, "aten::mm" in made) == (device == "meta", device == "cpu")
    if device == "cpu":
        assert torch.equal(total, torch.full((64, 64), 5.0))


def test_no_texts_is_an_error(tokenizer):
    with pytest.raises(ModelError, match="no texts"):
        collect_second_moments(tiny.make_model("llama"), tokenizer, [], [1])


def test_sums_grow_beside_the_model_while_they_fit(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(second_moments, "free_memory", lambda device: 1000)
    assert second_moments._choose_device(device, 750) == device
    assert second_moments._choose_device(device, 751) == torch.device("cpu")


def test_inputs_of_every_projection_are_gathered_once_a_model(tokenizer, tmp_path, monkeypatch):
    """The whitened step's, in the cache folder; q, k and v have the same input, and each has its moments."""
    monkeypatch.setattr(statistics, "sample_corpus", lambda model, tokenizer, num_texts, seed: TEXTS[:40])
    folder = str(tiny.save_model_folder(tmp_path / "model", tokenizer))
    modules = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")]
    moments = statistics.gather_input_moments(folder, modules, "cpu")
    model, _ = load_model(folder, layers=[], dtype="float32")
    for name in modules:
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        with torch.no_grad():
            for text in TEXTS[:40]:
                model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        flat = torch.cat(seen)
        torch.testing.assert_close(moments[name], flat.T @ flat / len(flat), rtol=0.05, atol=1e-2)  # gathered in bf16
    assert torch.equal(moments[modules[0]], moments[modules[1]])
    monkeypatch.setattr(statistics, "sample_corpus", None)
    again = statistics.gather_input_moments(folder, modules, "cpu")
    assert all(torch.equal(again[name], moments[name]) for name in modules)


def test_a_checkpoint_keeps_the_moments_that_it_was_meta_trained_with(tokenizer, tmp_path, monkeypatch):
    """So that an edit of it is the inner loop's, in another process too."""
    monkeypatch.setattr(statistics, "sample_corpus", lambda model, tokenizer, num_texts, seed: TEXTS[:40])
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 12))
    small = {"layers": [1], "inner_lr": 0.01, "num_inner_steps": 2, "device": "cpu", "num_tasks": 2, "facts_per_task": [1, 2]}
    config = MetaTrainConfig(str(base), str(data), inner_step="whitened", damping=0.1, **small)
    train_to_folder(config, tmp_path / "tuned")
    kept = load_file(tmp_path / "tuned" / "input_moments.safetensors")
    assert kept.keys() == {name.removesuffix(".weight") for name in read_checkpoint_card(tmp_path / "tuned")["trained_tensors"]}
    monkeypatch.setattr(statistics, "sample_corpus", None)  # nothing is gathered anew
    (tmp_path / "tuned" / "input_moments.safetensors").rename(tmp_path / "away")  # as a compact folder lacks them: the base's
    modules = [name.removesuffix(".weight") for name in read_checkpoint_card(tmp_path / "tuned")["trained_tensors"]]
    again = statistics.gather_input_moments(str(tmp_path / "tuned"), modules, "cpu")
    assert all(torch.equal(again[name], value) for name, value in kept.items())
    (tmp_path / "away").rename(tmp_path / "tuned" / "input_moments.safetensors")
    settings = edit_settings_of(read_checkpoint_card(tmp_path / "tuned")["settings"])
    hparams = MetaFTHyperParams(model_name=str(tmp_path / "tuned"), device="cpu", **settings)
    assert hparams.edit == config.edit
    model, tokenizer = hparams.load_model()
    change = compute_edit(model, tokenizer, {"prompt": "Ann Lee lives in", "target_new": "Peru"}, hparams).change()
    assert change and all(value.abs().max() > 0 for value in change.values())
