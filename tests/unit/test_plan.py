"""What a comparison would cost: models in the hub's cache are seen without a network, times nobody measured are guesses."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import tiny

from propmeta_edit.evaluation.rows import Row, RowFile
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.models.artefacts import find_model_folder
from propmeta_edit.recipes import plan
from propmeta_edit.recipes.comparison import METHODS, Setup
from propmeta_edit.recipes.plan import TYPICAL_SECONDS, describe_plan
from propmeta_edit.records import Case, EditRequest, Question

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
    plan._read_shape.cache_clear()
    return snapshot


def describe(tmp_path, model, names, rows=(), minutes=None):
    file = RowFile(tmp_path / "rows.jsonl")
    for row in rows:
        file.append(row)
    setup = Setup(model, {}, "cpu", "float32", 0, 8)
    said = describe_plan(names, setup, "smollm2-135m", DATA, file, None, {}, minutes)
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
    monkeypatch.setattr(plan, "TYPICAL_PARAMETERS", plan._read_shape("owner/tiny").num_parameters / 3)
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"])
    assert lines["CaKE"].endswith(f"{30 * 3 * TYPICAL_SECONDS['CaKE'] / 60:.0f} min (a guess)")
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"], [make_row(0, 60.0), make_row(1, 120.0)])
    assert lines["FT"].endswith("  42 min"), "28 cases of 90 s, measured"
    lines = describe(tmp_path, "owner/tiny", ["FT", "CaKE"], minutes=10)
    assert lines["FT"].endswith("  7 min"), "3 of 10 min are used up"
    assert lines["CaKE"].endswith("  10 min (a guess)")
    assert "17 min in all, 10 min of it guessed" in lines["on"]


def test_memory_counts_the_edits_side_by_side():
    """A shape of 8 billion parameters in 32 layers: 14.9 GiB in bf16, 0.93 GiB a layer in fp32."""
    shape = plan._Shape(8_000_000_000, 32, 14336)
    one, eight = (plan._estimate(METHODS["FT"], Setup("m", {}, "cpu", "bfloat16", 0, n), shape, "llama3-8b")[0] for n in (1, 8))
    assert one == pytest.approx(14.90 + 5 * 0.931, abs=0.02) and eight == pytest.approx(14.90 + 33 * 0.931, abs=0.05)
    setup = Setup("m", {}, "cpu", "bfloat16", 0, 1)
    whole, _ = plan._estimate(METHODS["FT-all-layers"], setup, shape, "llama3-8b")
    assert whole == pytest.approx(14.90 + 5 * 32 * 0.931, rel=0.001), "all layers, though there is no YAML of its own"
    moments = plan._estimate(METHODS["MEMIT"], Setup("m", {}, "cpu", "bfloat16", 0, 8), shape, "llama3-8b")
    assert moments == (pytest.approx(2 * 14.90 + 5 * 0.766, abs=0.02), pytest.approx(5 * 0.766, abs=0.01))


def test_every_row_has_a_typical_time():
    assert {kind.edit for kind in plan.METHODS.values()} <= set(TYPICAL_SECONDS)
