"""Memory that runs out within a step, and a disk that fills up between two saves: what is said, and what is still there."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors import SafetensorError

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.weights import snapshot
from propmeta_edit.metatrain import run as run_module
from propmeta_edit.metatrain import trainer
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question

REQUEST = EditRequest("Smith Innovation PLC was founded in", "Greece", "Smith Innovation PLC")
TASKS = [MetaTask(f"t{i}", REQUEST, Question("What is its currency?", ("euro",))) for i in range(6)]
CONFIG = MetaTrainConfig(model="tiny", layers=[1], num_inner_steps=1, inner_lr=0.01, outer_lr=0.01, tasks_per_step=2, save_every=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_task_and_the_setting(tokenizer, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(trainer, "_compute_gradients", fail)
    with pytest.raises(ModelError, match=r"2 tasks at once, the first of them t0 \('Smith.*'\); set tasks_at_once to less than 2"):
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG)


def test_another_error_is_not_taken_for_memory(tokenizer, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer, "_compute_gradients", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG)


def test_a_disk_that_fills_up_costs_the_tasks_since_the_last_save_alone(tokenizer, monkeypatch, tmp_path):
    """The second save fails; the run goes on from the first one, to the bits of a run that nothing happened to."""
    undisturbed = tiny.make_model("llama")
    trainer.meta_train(undisturbed, tokenizer, TASKS, CONFIG)
    saved = []

    def save_once(tensors, file, metadata=None):
        if saved:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        saved.append(file)
        save(tensors, file, metadata)

    save = run_module.save_file
    with (
        monkeypatch.context() as patch,
        pytest.raises(ModelError, match=r"No space left on device.*what was saved before is still there"),
    ):
        patch.setattr(run_module, "save_file", save_once)
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG, TrainingRun(tmp_path, {}))
    assert sorted(p.name for p in tmp_path.iterdir() if "state" in p.name) == ["state.safetensors"]
    model = tiny.make_model("llama")
    progress = trainer.meta_train(model, tokenizer, TASKS, CONFIG, TrainingRun(tmp_path, {}))
    assert [losses.task_id for losses in progress.losses] == [task.task_id for task in TASKS]
    expected = snapshot(select_parameters(undisturbed, [1]))
    assert all(torch.equal(p, expected[name]) for name, p in select_parameters(model, [1]).items())
