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

from propmeta_edit.data.world import generate_world
from propmeta_edit.metatrain.processes import ALONE, find_processes

ROOT = Path(__file__).resolve().parents[2]
NUM_TASKS = 22  # not a multiple of the four of a step: one process gets none in the last


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("processes")
    tiny.save_model_folder(folder / "base", tokenizer)
    tiny.write_records(folder / "train.jsonl", generate_world(0, {"train": NUM_TASKS})["train"])
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
@pytest.mark.parametrize("options", [(), ("--shard", "true", "--num_tasks", "20")], ids=["replicated", "sharded"])
def test_two_processes_are_one_with_twice_the_tasks(place, options):
    alone = run(command(place, f"alone{len(options)}", 4, *options[2:]))
    assert alone.returncode == 0, alone.stderr
    expected, expected_losses, _ = read(place / f"alone{len(options)}")
    output = f"two{len(options)}"
    done = run(command(place, output, 2, *options), num_processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    weights, losses, card = read(place / output)
    assert card["processes"] == 2 and card["settings"]["tasks_per_step"] == 2
    assert losses == pytest.approx(expected_losses, rel=1e-4) and len(losses) in (NUM_TASKS, 20)
    moved = 0
    base = load_file(place / "base" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)
        moved += not torch.equal(value, base[name])
    assert moved == len(card["trained_tensors"]), "every frozen tensor is the base's, to the bit"


@pytest.mark.slow
def test_sharded_blocks_need_even_shares(place):
    done = run(command(place, "uneven", 4, "--shard", "true"))
    assert done.returncode == 2
    assert "num_tasks must be a multiple of tasks_per_step times the processes (4 x 1), got 22" in done.stderr


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes("cpu") is ALONE and ALONE.is_main
    assert ALONE.join([1, 2]) == [1, 2]
