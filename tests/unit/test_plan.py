"""What a comparison would cost: models in the hub's cache are seen without a network, times nobody measured are guesses."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import tiny
import torch

from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.models.artefacts import find_model_folder
from propmeta_edit.recipes.meta_training import load_tasks, resolve
from propmeta_edit.records import Case, EditRequest, Question
from propmeta_edit.studies import cost
from propmeta_edit.studies.cost import TYPICAL_SECONDS, Asked, describe_plan, estimate_memory, try_tasks
from propmeta_edit.studies.methods import METHODS
from propmeta_edit.studies.runs import shape_of
from propmeta_edit.studies.variants import Bench

CASES = [Case(f"c{n}", (EditRequest(f"Ann {n} lives in", "Peru"),), Question("Where?", ("Lima",))) for n in range(30)]
DATA = [DataSet("d", "sha", CASES)]


@pytest.fixture
def hub(tmp_path, monkeypatch, tokenizer):
    """The hub's cache with one model in it, as the hub's library lays it out, and no network."""
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / "abc"
    tiny.save_model_folder(snapshot, tokenizer)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    fetch = huggingface_hub.snapshot_download

    def local_only(name, **options):
        assert options == {"local_files_only": True}, "a plan must not reach for the network"
        return fetch(name, cache_dir=tmp_path / "hub", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    shape_of.cache_clear()
    return snapshot


def describe(tmp_path, model, names, rows=(), minutes=None):
    bench = Bench(model, "tiny", "cpu", "float32", folder=tmp_path)
    asked = [Asked(name, METHODS[name], data) for name in names for data in DATA]
    said = describe_plan(asked, bench, rows, limit=None, limits={}, minutes_per_row=minutes)
    return {line.split()[0]: line for line in said.splitlines() if line}


def make_row(number, seconds):
    return Row("FT", "d", f"c{number}", "m", "h", "sha", "p", 0, "h", seconds=seconds)


def test_a_model_in_the_hubs_cache_is_there(hub, tmp_path):
    assert find_model_folder("owner/tiny") == hub
    assert find_model_folder("owner/other") is None and find_model_folder("no such thing") is None
    lines = describe(tmp_path, "owner/tiny", ["FT", "MetaFT"])
    assert "(to fetch)" not in lines["FT"] and "0.0 GiB" in lines["FT"] and "(to fetch)" in lines["MetaFT"]


def test_weights_of_which_a_part_is_missing_are_to_be_fetched(hub):
    (hub / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}})
    )
    assert find_model_folder("owner/tiny") is None
    (hub / "second.safetensors").write_bytes(b"x")
    assert find_model_folder("owner/tiny") == hub
    (hub / "model.safetensors.index.json").unlink()
    for file in hub.glob("*.safetensors"):
        file.unlink()
    assert find_model_folder("owner/tiny") is None


def test_what_was_never_timed_is_a_guess_by_size_and_a_budget_caps_it(hub, tmp_path, monkeypatch):
    size = sum(p.numel() for p in shape_of("owner/tiny").parameters())
    monkeypatch.setattr(cost, "TYPICAL_PARAMETERS", size / 3)
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"])
    assert lines["CaKE"].endswith(f"{30 * 3 * TYPICAL_SECONDS['CaKE'] / 60:.0f} min (a guess)")
    timed = [make_row(0, 60.0), make_row(1, 120.0)]
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"], timed)
    assert lines["FT"].endswith("  42 min"), "28 cases of 90 s, measured"
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"], timed, minutes=10)
    assert lines["FT"].endswith("  7 min"), "3 of 10 min are used up"
    assert lines["CaKE"].endswith("  10 min (a guess)")
    assert "17 min in all, 10 min guessed" in lines["58"], "28 and 30 cases"


@pytest.fixture
def llama(tmp_path):
    """The shape of Llama-3-8B, from its configuration alone: 14.96 GiB in bf16, of which a layer has 0.8125 GiB in fp32."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path / "llama3-8b")
    return str(tmp_path / "llama3-8b")


def test_memory_counts_the_edits_side_by_side(llama):
    def memory_of(name, edits_at_once):
        bench = Bench(llama, "llama3-8b", "cpu", "bfloat16", edits_at_once=edits_at_once)
        return estimate_memory(METHODS[name], bench)

    one, eight = (memory_of("FT", n)[0] for n in (1, 8))
    model, largest = 14.96 + 0.8125 / 2, 0.21875  # the layer is fp32 in it; a matrix of its MLP
    assert one == pytest.approx(model + 3 * 0.8125 + largest, abs=0.02)
    assert eight == pytest.approx(model + 8 * (3 * 0.8125 + largest), abs=0.02)
    whole, _ = memory_of("FT-all-layers", 1)
    every = 32 * 0.8125
    assert whole == pytest.approx(14.96 + every / 2 + 3 * every + largest, rel=0.001), "though there is no YAML of its own"
    moments = memory_of("MEMIT", 8)
    assert moments == (pytest.approx(2 * 14.96 + 5 * 0.766, abs=0.02), pytest.approx(5 * 0.766, abs=0.01))


def test_every_row_has_a_typical_time():
    assert {variant.edit for variant in METHODS.values()} <= set(TYPICAL_SECONDS)


def test_a_dry_run_times_the_outer_step_too_and_moves_nothing(tmp_path, tokenizer, monkeypatch):
    """Every task starts at the same weights: its losses are those of a first step."""
    folder = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 6))
    config = resolve(MetaTrainConfig(str(folder), str(data), layers=[1], inner_lr=0.01, device="cpu", tasks_per_step=2))
    tasks, _ = load_tasks(config)
    taken, moved = [], []

    def step(optimizer, parameters, gradients):
        before = {name: value.detach().clone() for name, value in parameters.items()}
        apply_outer_step(optimizer, parameters, gradients)
        taken.append(len(gradients.related_losses))
        moved.extend(name for name, value in parameters.items() if not torch.equal(value, before[name]))

    monkeypatch.setattr(cost, "apply_outer_step", step)
    seconds, learning = try_tasks(config, tasks)
    assert taken == [2, 2, 2] and moved == [] and len(seconds) == 3 and len(learning) == 6
    alone = [one for pair in (tasks[:2], tasks[2:4], tasks[4:6]) for one in try_tasks(config, pair, steps=1)[1]]
    assert learning == alone
