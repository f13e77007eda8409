"""Meta-training killed at any moment ends with the bits of a run that was not, and damaged states are not trusted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.errors import ModelError, OriginError
from propmeta_edit.files import sha256_of_file
from propmeta_edit.finetune.saved_state import PREVIOUS_STATE, STATE
from propmeta_edit.metatrain import trainer
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.metatrain.trainer import meta_train
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.recipes.meta_training import train_to_folder
from propmeta_edit.records import EditRequest, MetaTask, Question

ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    MetaTask(f"t{i}", EditRequest(f"Ann {i} is a citizen of", name), Question(f"What does Ann {i} speak?", (answer,)))
    for i, (name, answer) in enumerate([("Peru", "Spanish"), ("Greece", "Greek"), ("France", "French"), ("Lima", "euro")] * 3)
]
CONFIG = MetaTrainConfig(
    model="tiny",
    layers=[1],
    inner_lr=0.01,
    num_inner_steps=2,
    outer_lr=0.01,
    outer_schedule="linear",
    tasks_per_step=2,
    save_every=2,
)


class Stopped(Exception):
    """What stands for a crash below."""


def train(tokenizer, folder, stop_after=None):
    """A run of twelve tasks in fp32, broken off after some validations; the trained tensors."""
    model = tiny.make_model("llama", dtype=torch.float32)
    calls = []

    def validate():
        calls.append(1)
        if stop_after is not None and len(calls) > stop_after:
            raise Stopped
        return {"valid-id": 0.5}

    config = MetaTrainConfig(**{**vars(CONFIG), "validate_every": 2})
    progress = meta_train(model, tokenizer, TASKS, config, TrainingRun(folder, {"a": 1}), validate)
    return {name: p.detach().clone() for name, p in select_parameters(model, [1]).items()}, progress


def test_every_point_of_interruption_gives_the_same_bits(tokenizer, tmp_path):
    whole, progress = train(tokenizer, tmp_path / "whole")
    for stop_after in range(1, 7):
        folder = tmp_path / str(stop_after)
        with pytest.raises(Stopped):
            train(tokenizer, folder, stop_after)
        resumed, resumed_progress = train(tokenizer, folder)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stop_after
        assert resumed_progress == progress


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_gives_way_to_the_one_before(tokenizer, tmp_path, damage, caplog):
    whole, _ = train(tokenizer, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tokenizer, tmp_path / "run", 4)
    state = tmp_path / "run" / STATE
    content = state.read_bytes()
    flipped = content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]
    state.write_bytes({"truncated": content[: len(content) // 2], "flipped": flipped, "empty": b""}[damage])
    assert (tmp_path / "run" / PREVIOUS_STATE).is_file()
    resumed, _ = train(tokenizer, tmp_path / "run")
    assert "is damaged" in caplog.text
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_run_is_refused(tmp_path):
    TrainingRun(tmp_path, {"outer_lr": 0.1, "seed": 0}).claim()
    with pytest.raises(OriginError, match=r"outer_lr 0\.1, now 0\.2"):
        TrainingRun(tmp_path, {"outer_lr": 0.2, "seed": 0})


def test_a_run_goes_on_with_fewer_tasks_at_once(tokenizer, tmp_path, monkeypatch, caplog):
    """What the message says when memory runs out: same command, lower tasks_at_once, from the state that is there."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 8))
    config = replace(CONFIG, model=str(base), data=str(data), device="cpu")
    compute, calls = trainer._compute_gradients, []

    def run_out(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return compute(*arguments)

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="set tasks_at_once to less than 2"):
        patch.setattr(trainer, "_compute_gradients", run_out)
        train_to_folder(config, tmp_path / "killed")
    with caplog.at_level("INFO"):
        train_to_folder(replace(config, tasks_at_once=1), tmp_path / "killed")
    assert "continuing after 4 tasks" in caplog.text
    assert "rounding differs from here on, with tasks_at_once None, now 1" in caplog.text
    assert "rounding differs" in (tmp_path / "killed" / "training" / "log.txt").read_text()
    assert json.loads((tmp_path / "killed" / "training" / "settings.json").read_text())["tasks_at_once"] == 1
    train_to_folder(config, tmp_path / "whole")
    killed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    for name, tensor in whole.items():
        torch.testing.assert_close(killed[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.fixture
def start(tokenizer, tmp_path):
    """Starts the command on a tiny model and so many tasks, towards a folder of that name."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)

    def start(output, num_tasks, save_every):
        if not (tmp_path / "train.jsonl").exists():
            tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", num_tasks))
        command = [sys.executable, "-m", "propmeta_edit.cli", "meta-train", "--model", str(base), "--data"]
        command += [str(tmp_path / "train.jsonl"), "--output", str(tmp_path / output), "--layers", "[1]", "--device", "cpu"]
        command += ["--inner_lr", "0.01", "--outer_lr", "0.01", "--save_every", str(save_every)]
        with open(tmp_path / f"{output}.log", "w") as log:  # not a pipe, which would fill up where nobody reads it
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_many_times_it_ends_with_the_same_bits(start, tmp_path, kills):
    """The command itself, killed without warning (-9) at random moments and given again, against one that was left alone."""
    num_tasks, moments = 24 * kills, random.Random(kills)
    assert start("whole", num_tasks, 5).wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    state = tmp_path / "killed.training" / STATE
    for _ in range(kills):
        process = start("killed", num_tasks, 5)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and (state.stat().st_mtime_ns if state.exists() else 0) == before:
            time.sleep(0.01)  # until it has got further than the one before it
        time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "it must not end before it is killed"
        process.kill()
        process.wait()
    assert start("killed", num_tasks, 5).wait(timeout=300) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert sha256_of_file(first) == sha256_of_file(second)
    first, second = (json.loads((tmp_path / name / "progress.json").read_text()) for name in ("whole", "killed"))
    assert first["seconds"] > 0 and second["seconds"] > 0
    assert first["losses"] == second["losses"] and len(first["losses"]) == num_tasks and first["validation"] == second["validation"]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(start, tmp_path):
    """A scheduler's time limit: the state of the step that was under way is on disk, and the final bits are the same."""
    process = start("stopped", 120, 10)
    state = tmp_path / "stopped.training" / STATE
    deadline = time.time() + 60
    while not state.exists() and time.time() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 2
    assert "everything is saved, and the same command continues" in (tmp_path / "stopped.log").read_text()
    assert start("stopped", 120, 10).wait(timeout=300) == 0 and start("whole", 120, 10).wait(timeout=300) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert sha256_of_file(first) == sha256_of_file(second)
