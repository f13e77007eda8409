"""Saving a run: in a thread, from one copy on the host, by tasks and by minutes; what goes wrong there reaches the loop."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save
from torch.utils._python_dispatch import TorchDispatchMode

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune import saved_state
from propmeta_edit.finetune.saved_state import PREVIOUS_STATE, STATE, take_state, write_state
from propmeta_edit.metatrain import run as metatrain_run
from propmeta_edit.metatrain import trainer
from propmeta_edit.metatrain.background import BackgroundWriter
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question

ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    MetaTask(f"t{i}", EditRequest(f"Ann {i} is a citizen of", "Peru"), Question(f"What does Ann {i} speak?", ("Spanish",)))
    for i in range(8)
]
CONFIG = MetaTrainConfig(model="tiny", layers=[1], num_inner_steps=1, inner_lr=0.01, outer_lr=0.01, tasks_per_step=2, save_every=2)
PATIENCE = 30  # seconds, for what comes at once


def train(tokenizer, folder, config=CONFIG, **more):
    model = tiny.make_model("llama", dtype=torch.float32)
    progress = trainer.meta_train(model, tokenizer, TASKS, config, TrainingRun(folder, {}), **more)
    return {name: p.detach().clone() for name, p in select_parameters(model, [1]).items()}, progress


def count_saves(monkeypatch, during=lambda: None):
    """After how many tasks each state was written."""
    saved, write = [], TrainingRun.save

    def note(self, state, progress):
        during()
        write(self, state, progress)
        saved.append(len(progress.losses))

    monkeypatch.setattr(TrainingRun, "save", note)
    return saved


def test_the_loop_goes_on_while_a_state_is_written(tokenizer, tmp_path, monkeypatch):
    """The first state is not written before the second step is over: a loop that waited for it would never get there."""
    further, got_there = threading.Event(), []
    saved = count_saves(monkeypatch, lambda: got_there.append(further.wait(PATIENCE)))
    train(tokenizer, tmp_path, replace(CONFIG, save_every=4), report=lambda done, numbers: further.set() if done > 4 else None)
    assert got_there == [True, True] and saved == [4, 8]


def test_a_save_waits_for_the_one_before(tokenizer, tmp_path, monkeypatch):
    """So that there are never two copies; and each is of its own step, not of the one that the loop has got to."""
    order, take = [], trainer.take_state

    def note_copy(*of):
        order.append("copy")
        return take(*of)

    monkeypatch.setattr(trainer, "take_state", note_copy)
    saved = count_saves(monkeypatch, lambda: (time.sleep(0.05), order.append("written")))
    train(tokenizer, tmp_path)
    assert order == ["copy", "written"] * 4 and saved == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("every", "minutes", "expected"),
    [(None, 1e-9, [2, 4, 6, 8]), (None, 1e9, [8]), (None, None, [8]), (4, None, [4, 8]), (4, 1e9, [4, 8])],
)
def test_a_state_is_due_by_tasks_or_by_minutes(tokenizer, tmp_path, monkeypatch, every, minutes, expected):
    saved = count_saves(monkeypatch)
    train(tokenizer, tmp_path, replace(CONFIG, save_every=every, save_minutes=minutes))
    assert saved == expected


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_minutes_must_be_above_0(minutes):
    with pytest.raises(ConfigError, match=rf"save_minutes must be above 0, or null, got {minutes}"):
        replace(CONFIG, save_minutes=minutes)


def test_minutes_change_no_name_of_a_run():
    assert replace(CONFIG, save_minutes=None).decisive == CONFIG.decisive
    assert "save_minutes" not in CONFIG.decisive and CONFIG.decisive["save_every"] == 2


def test_a_full_disk_ends_the_run_at_the_next_step(tokenizer, tmp_path, monkeypatch):
    """Not when the next state is due, nor at the run's end, hours later."""
    begun, done, start = [], [], BackgroundWriter.start

    def note(self, work):
        start(self, work)
        begun.append(self._work)

    def wait_for_the_writer(number, numbers):
        done.append(number)
        wait(begun, PATIENCE)

    monkeypatch.setattr(BackgroundWriter, "start", note)
    monkeypatch.setattr(saved_state, "save_file", fill_the_disk)
    with pytest.raises(ModelError, match=r"cannot write .*No space left on device; what was saved before is still there"):
        train(tokenizer, tmp_path, replace(CONFIG, save_every=4), report=wait_for_the_writer)
    assert done == [2, 4, 6] and len(begun) == 1 and not list(tmp_path.glob("*state*"))


def fill_the_disk(*of):
    raise OSError(28, "No space left on device")


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_thread(caplog):
    def fail():
        raise ModelError("no space")

    with pytest.raises(ValueError, match="of the loop"), BackgroundWriter() as writer:
        writer.start(fail)
        raise ValueError("of the loop")
    assert "what was being saved meanwhile is not there: no space" in caplog.text
    with pytest.raises(ModelError, match="no space"), BackgroundWriter() as writer:
        writer.start(fail)


def test_everything_is_saved_where_a_stopped_run_says_so(tokenizer, tmp_path, monkeypatch):
    saved = count_saves(monkeypatch, lambda: time.sleep(0.05))
    with pytest.raises(trainer.Stopped, match="stopped after 2 of 8 tasks; everything is saved"):
        train(tokenizer, tmp_path, should_stop=lambda: True)
    assert saved == [2] and (tmp_path / STATE).is_file()
    monkeypatch.setattr(saved_state, "save_file", fill_the_disk)
    with pytest.raises(ModelError, match="No space left"):
        train(tokenizer, tmp_path, should_stop=lambda: True)


class CountCopies(TorchDispatchMode):
    """Bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function._schema.name in ("aten::empty", "aten::clone", "aten::_to_copy", "aten::empty_like", "aten::empty_strided"):
            self.made += result.nbytes
        return result


def test_there_is_one_copy_of_a_state_and_no_second(tmp_path):
    """Of tensors of 16 MB: neither torch nor Python holds more of them while they are hashed and written."""
    parameters = {f"w{i}": torch.nn.Parameter(torch.randn(1024, 4096)) for i in range(2)}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = 3 * sum(p.nbytes for p in parameters.values())
    with CountCopies() as copies:
        state = take_state(parameters, optimizer)
        assert copies.made == pytest.approx(whole, rel=1e-3)
        tracemalloc.start()
        write_state(tmp_path, state, "{}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert copies.made == pytest.approx(whole, rel=1e-3) and peak < 2**20
    held = state["theta.w0"]
    assert held.data_ptr() != parameters["w0"].data_ptr() and torch.equal(held, parameters["w0"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_checksum_is_that_of_states_that_are_there(tmp_path, dtype):
    """Written so until now: a run that was stopped goes on, and what runs kept is read."""
    tensors = {"theta.ä.weight": torch.randn(3, 5).to(dtype), "step.b": torch.tensor(2.0), "exp_avg.b": torch.ones(7, dtype=dtype)}
    digest = hashlib.sha256(b"text")
    for name in sorted(tensors):
        digest.update(save({name: tensors[name]}))
    assert saved_state._checksum(tensors, "text") == digest.hexdigest()


PAUSED = """
import sys, time, safetensors.torch
from propmeta_edit.finetune import saved_state
from propmeta_edit.cli import main
calls = []
write = saved_state.save_file
def stop_halfway(tensors, file, metadata=None):
    calls.append(1)
    write(tensors, file, metadata)
    if len(calls) == 3:
        whole = open(file, "rb").read()
        open(file, "wb").write(whole[: len(whole) // 2])
        open(sys.argv[1], "w").close()
        time.sleep(600)
saved_state.save_file = stop_halfway
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_it_loses_that_save_alone(tokenizer, tmp_path):
    """The third of a real run, killed with -9 while half of its file is written; the run ends with the bits of a whole one."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 12))
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    common = ["meta-train", "--model", str(base), "--data", str(data), "--layers", "[1]", "--device", "cpu", "--save_every", "2"]
    common += ["--inner_lr", "0.01", "--outer_lr", "0.01", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    marker = tmp_path / "halfway"
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, str(script), str(marker), *common, str(tmp_path / "killed")]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        deadline = time.time() + 120
        while not marker.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        assert marker.exists(), (tmp_path / "log").read_text()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
    training = tmp_path / "killed.training"
    assert (training / STATE).is_file() and (training / PREVIOUS_STATE).is_file()

    def go_on(output):
        command = [sys.executable, "-m", "propmeta_edit.cli", *common, str(tmp_path / output)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return (tmp_path / output / "training" / "log.txt").read_text()

    assert "continuing after 4 tasks" in go_on("killed")
    go_on("whole")
    killed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())
    assert metatrain_run.SETTINGS in {file.name for file in (tmp_path / "killed" / "training").iterdir()}
