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
from torch.distributed.tensor import DTensor

from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.processes import ALONE, Processes, find_processes, shard_frozen_blocks
from propmeta_edit.models.layers import get_blocks, select_parameters
from propmeta_edit.text.encoding import TextEncoder, collate

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


@pytest.fixture
def process_group():
    """A group of this process alone; what is spread over it is handled as over many."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Processes(0, 1, "cpu")
    torch.distributed.destroy_process_group()


def test_sharded_blocks_are_put_together_for_no_longer_than_they_are_needed(tokenizer, process_group):
    """Below the trained layer, where there is no backward, and above it."""
    model = tiny.make_model("llama", num_layers=5, dtype=torch.float32)
    parameters = select_parameters(model, [2])
    shard_frozen_blocks(model, parameters, process_group)
    batch = collate([TextEncoder(tokenizer).encode_answer("Ann Lee lives in", "Peru")])

    def sharded():
        return [all(isinstance(p, DTensor) for p in block.parameters()) for block in get_blocks(model)]

    at_rest = [True, True, False, True, True]
    assert sharded() == at_rest
    with only_trainable(model, parameters):
        prefix = FrozenPrefix(model, parameters)
        states = prefix.compute_states(batch)
        assert sharded() == at_rest
        with prefix.skipped(states):
            loss = compute_answer_loss(model, batch).sum()
        assert sharded() == at_rest
        torch.autograd.grad(loss, list(parameters.values()))
    assert sharded() == at_rest


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes("cpu") is ALONE and ALONE.is_main
    assert ALONE.join([1, 2]) == [1, 2]
