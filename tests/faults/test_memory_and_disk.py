"""Memory that runs out within a step, and a disk that fills up between two saves: what is said, and what is still there."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import SafetensorError

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune import saved_state
from propmeta_edit.finetune.weights import snapshot
from propmeta_edit.metatrain import trainer
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.recipes import meta_training
from propmeta_edit.records import Case, EditRequest, MetaTask, Question
from propmeta_edit.studies import cost

REQUEST = EditRequest("Smith Innovation PLC was founded in", "Greece", "Smith Innovation PLC")
TASKS = [MetaTask(f"t{i}", REQUEST, Question("What is its currency?", ("euro",))) for i in range(6)]
CASES = [Case(f"c{i}", (REQUEST,), Question("What is its currency?", ("no such answer",))) for i in range(6)]
CONFIG = MetaTrainConfig(model="tiny", layers=[1], num_inner_steps=1, inner_lr=0.01, outer_lr=0.01, tasks_per_step=2, save_every=2)


def run_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
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


def test_out_of_memory_with_one_task_is_the_models_size(tokenizer, monkeypatch):
    monkeypatch.setattr(trainer, "_compute_gradients", run_out_of_memory)
    with pytest.raises(
        ModelError, match=r"with 1 tasks at once, .*; the model itself is too large for this device: dtype bfloat16"
    ):
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, replace(CONFIG, tasks_at_once=1))


def test_out_of_memory_in_the_outer_step_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(trainer, "apply_outer_step", run_out_of_memory)
    with pytest.raises(ModelError, match=r"out of memory in the outer step after 0 tasks: .*; train fewer layers or modules"):
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG)


@pytest.mark.parametrize(("room", "expected"), [(0, [1] * 6), (3, [3, 3]), (1000, [6])])
def test_validation_holds_as_many_edits_as_fit(tokenizer, monkeypatch, room, expected):
    """Each takes five times the edited tensors, in half of what is free."""
    model, held = tiny.make_model("llama"), []
    edited = sum(p.nbytes for p in select_parameters(model, [1]).values())

    @contextmanager
    def count(model, tokenizer, edits, *args, **kwargs):
        held.append(len(edits))
        yield

    monkeypatch.setattr(meta_training, "free_memory", lambda device: room * 2 * 5 * edited)
    monkeypatch.setattr(meta_training, "many_edits", count)
    assert meta_training.compute_validation(model, tokenizer, CONFIG.edit, {"valid-id": CASES}) == {"valid-id": 0.0}
    assert held == expected


def test_out_of_memory_in_validation_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(meta_training, "many_edits", run_out_of_memory)
    with pytest.raises(
        ModelError, match=r"out of memory in validation, with 6 edits at once, .* of case c0; .*validate_every: null"
    ):
        meta_training.compute_validation(tiny.make_model("llama"), tokenizer, CONFIG.edit, {"valid-id": CASES})


@pytest.mark.parametrize(
    ("options", "side_by_side", "gibibytes"),
    [
        ({}, 2, 2 + 3.5 * 2),
        ({"tasks_at_once": 1}, 1, 2 + 3.5 + 1),
        ({"tasks_per_step": 1}, 1, 2 + 3.5),
    ],
)
def test_the_dry_run_counts_the_gradient_of_a_part(tokenizer, monkeypatch, tmp_path, options, side_by_side, gibibytes):
    """Of two trained tensors of half a GiB each copy shows, and each single gradient; the model around them is tiny."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 4))
    config = replace(CONFIG, model=str(base), data=str(data), device="cpu", **options)
    monkeypatch.setattr(cost, "_sizes_of", lambda *of: [2**29, 2**29])
    plan = cost.describe_run(config, steps=1)
    assert f"{config.tasks_per_step} a step, {side_by_side} at once" in plan and f"at least {gibibytes:.2f} GiB" in plan


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

    save = saved_state.save_file
    with (
        monkeypatch.context() as patch,
        pytest.raises(ModelError, match=r"No space left on device.*what was saved before is still there"),
    ):
        patch.setattr(saved_state, "save_file", save_once)
        trainer.meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG, TrainingRun(tmp_path, {}))
    assert sorted(p.name for p in tmp_path.iterdir() if "state" in p.name) == ["state.safetensors"]
    model = tiny.make_model("llama")
    progress = trainer.meta_train(model, tokenizer, TASKS, CONFIG, TrainingRun(tmp_path, {}))
    assert [losses.task_id for losses in progress.losses] == [task.task_id for task in TASKS]
    expected = snapshot(select_parameters(undisturbed, [1]))
    assert all(torch.equal(p, expected[name]) for name, p in select_parameters(model, [1]).items())
