"""Second moments of the keys against the obvious sum, continued runs, and the files EasyEdit reads."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit.baselines import second_moments
from propmeta_edit.baselines.second_moments import (
    collect_second_moments,
    read_second_moment,
    statistics_file,
    write_statistics,
)
from propmeta_edit.errors import ModelError
from propmeta_edit.models.layers import key_module_name

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
    assert list(moments.sums) == [key_module_name(model.config.model_type, layer) for layer in (0, 2)]
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


def test_no_texts_is_an_error(tokenizer):
    with pytest.raises(ModelError, match="no texts"):
        collect_second_moments(tiny.make_model("llama"), tokenizer, [], [1])


def test_sums_grow_beside_the_model_while_they_fit(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(second_moments, "free_memory", lambda device: 1000)
    assert second_moments._choose_device(device, 500) == device
    assert second_moments._choose_device(device, 501) == torch.device("cpu")
