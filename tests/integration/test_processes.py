"""One run shared by two processes over gloo: the outer steps of one process with twice the tasks a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.errors import ModelError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.processes import ALONE, find_processes, own_gpus
from propmeta_edit.recipes import meta_training

ROOT = Path(__file__).resolve().parents[2]
NUM_TASKS = 22  # not a multiple of the four of a step: one process gets none in the last


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("processes")
    tiny.save_model_folder(folder / "base", tokenizer)
    tiny.write_records(folder / "train.jsonl", tiny.world_records("train_data_id", NUM_TASKS))
    return folder


def command(place, output, tasks_per_step, *options):
    values = ["--model", str(place / "base"), "--data", str(place / "train.jsonl"), "--output", str(place / output)]
    values += ["--layers", "[1]", "--device", "cpu", "--inner_lr", "0.01", "--outer_lr", "0.01", "--save_every", "8"]
    return ["-m", "propmeta_edit.cli", "meta-train", *values, "--tasks_per_step", str(tasks_per_step), *options]


def run(arguments, num_processes=1):
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return subprocess.run([*launcher, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def read(folder):
    losses = [row["related_loss"] for row in json.loads((folder / "progress.json").read_text())["losses"]]
    return load_file(folder / "model.safetensors"), losses, json.loads((folder / "metaft.json").read_text())


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_tasks(place):
    alone = run(command(place, "alone", 4))
    assert alone.returncode == 0, alone.stderr
    expected, expected_losses, _ = read(place / "alone")
    done = run(command(place, "two", 2), num_processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    weights, losses, card = read(place / "two")
    assert card["processes"] == 2 and card["settings"]["tasks_per_step"] == 2
    assert losses == pytest.approx(expected_losses, rel=1e-4) and len(losses) == NUM_TASKS
    moved = 0
    base = load_file(place / "base" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)
        moved += not torch.equal(value, base[name])
    assert moved == len(card["trained_tensors"]), "every frozen tensor is the base's, to the bit"


@pytest.mark.parametrize(
    ("started", "own"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, [1, 3]),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "5"}, [2]),
    ],
)
def test_processes_of_a_machine_share_its_gpus_out(monkeypatch, started, own):
    """As many each, the first the one that accelerate gives the process."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert own_gpus() == own


def test_shard_lets_transformers_spread_the_blocks(place, monkeypatch):
    """Over this process's GPUs alone, as far as they have room; with one GPU or none the model is loaded as ever."""
    config = MetaTrainConfig(str(place / "base"), layers=[1], shard=True, device="cuda:1", dtype="float32")
    given = []

    def load(folder, **options):
        given.append(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("propmeta_edit.models.loading.free_memory", lambda device: 1000 + device.index)
    for own in ([1, 3], [1]):
        monkeypatch.setattr(meta_training, "own_gpus", lambda own=own: own)
        with pytest.raises(ModelError, match="enough"):
            meta_training._load_for_training(config, str(place / "base"))
    assert given[0]["device_map"] == "balanced" and given[0]["max_memory"] == {1: 1001, 3: 1003}
    assert given[0]["attn_implementation"] is None and "device_map" not in given[1]


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes("cpu") is ALONE and ALONE.is_main
    assert ALONE.join([1, 2]) == [1, 2]
