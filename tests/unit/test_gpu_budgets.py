"""Reads, copies, launches and memory of a GPU, counted on one that exists only in Python (``tests/fake_device``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import give_input_moments
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.memory import bytes_of_a_result
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import compute_task_gradients
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.studies import cost
from propmeta_edit.studies.methods import METHODS
from propmeta_edit.studies.runs import shape_of
from propmeta_edit.studies.variants import Bench
from propmeta_edit.text.encoding import TextEncoder, collate, encode_requests

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_device"))

from device import READS, UNKNOWN_SIZES
from jobs import LLAMA3_8B, PROJECTIONS, SAVED, saved_bytes, shapes_of_layer

ROOT = Path(__file__).parents[2]
GIB = 2**30
FAMILIES = [*tiny.FAMILIES, "gemma3_text"]
AT_8B = {  # the last layer is edited where memory alone is asked for: no block is above it, and it has the same sizes
    "edit": {"steps": 2},
    "8 edits": {"at_once": 8, "layer": 31, "steps": 2},
    "64 edits": {"at_once": 64, "layer": 31, "steps": 2},
    "task": {"kind": "task", "layer": 31, "steps": 2},
    "4 tasks": {"kind": "task", "at_once": 4, "layer": 31, "steps": 2},
    "edit of low rank": {"at_once": 1, "layer": 31, "steps": 10, "inner_step": "whitened"},
    "64 edits of low rank": {"at_once": 64, "layer": 31, "steps": 10, "inner_step": "whitened"},
    "4 tasks of low rank": {"kind": "task", "at_once": 4, "layer": 31, "steps": 2, "inner_step": "whitened"},
    "statistics": {"kind": "statistics", "layer": [4, 5, 6, 7, 8]},
    "4 tasks of rank 16": {"kind": "task", "at_once": 4, "layer": 31, "steps": 2, "rank": 16},
}
KINDS = {"edit": 1, "task": 2}  # how many at once: an edit in place, and tasks on stacked weights
SMALL = {
    f"{family} {kind} {steps}": {"family": family, "kind": kind, "at_once": at_once, "layer": 1, "steps": steps}
    for family in FAMILIES
    for kind, at_once in KINDS.items()
    for steps in (2, 3)
}
SPREAD = {  # the edited layer before the cut, behind it, and on both sides of it
    f"{family} {kind} {layer} {at_once}": {
        "family": family,
        "kind": kind,
        "layer": layer,
        "at_once": at_once,
        "steps": 3,
        "split": 1,
    }
    for family in FAMILIES
    for kind, layer, at_once in (("edit", 0, 1), ("edit", [0, 2], 2), ("task", 1, 2), ("question", 1, 1))
}
LAUNCHES_A_STEP = {"llama": 280, "qwen2": 290, "gpt2": 145, "gemma3_text": 485}  # two blocks of three


def count(jobs):
    """The counts of each job, from a process of its own: the device is registered for good."""
    command = [sys.executable, str(ROOT / "tests" / "fake_device"), "--jobs", json.dumps(list(jobs.values()))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def at_8b():
    return count(AT_8B)


@pytest.fixture(scope="module")
def small():
    return count(SMALL)


@pytest.fixture(scope="module")
def spread():
    return count(SPREAD)


@pytest.fixture
def plan(tmp_path):
    """Settings of a run on the shape of Llama-3-8B, of which there is the configuration alone."""
    LlamaConfig(**LLAMA3_8B).save_pretrained(tmp_path / "llama3-8b")
    shape_of.cache_clear()
    return MetaTrainConfig(str(tmp_path / "llama3-8b"), layers=[31], dtype="bfloat16", device="cpu")


@pytest.mark.parametrize(("name", "num_edits", "goal"), [("edit", 1, 18.02), ("8 edits", 8, 36.6), ("64 edits", 64, 185.4)])
def test_a_plan_says_what_edits_take(at_8b, plan, name, num_edits, goal):
    peak = at_8b[name]["peak"] / GIB
    bench = Bench(plan.model, "llama3-8b", "cpu", "bfloat16", edits_at_once=num_edits)
    assert cost.estimate_memory(METHODS["FT"], bench)[0] == pytest.approx(peak, rel=0.03)
    assert peak == pytest.approx(goal, rel=0.01), "three copies an edit and one gradient"


@pytest.mark.parametrize(("name", "num_edits"), [("edit of low rank", 1), ("64 edits of low rank", 64)])
def test_a_plan_says_what_edits_of_low_rank_take(at_8b, plan, monkeypatch, name, num_edits):
    """As for a checkpoint whose card says how it was meta-trained: the model, inverse moments and factors, which are counted here,
    and the weights of one edit, which are made when it is put in place."""
    peak, sizes = at_8b[name]["peak"], [4 * shape.numel() for shape in shapes_of_layer().values()]
    bench = Bench(plan.model, "llama3-8b", "cpu", "bfloat16", edits_at_once=num_edits, checkpoints={"bound": plan.model})
    settings = {"layers": [31], "inner_step": "whitened", "positions": "subject", "num_inner_steps": 10, "inner_lr": 0.1}
    monkeypatch.setattr(cost, "read_checkpoint_card", lambda folder: {"settings": settings})
    planned = GIB * cost.estimate_memory(METHODS["MetaFT-bound"], bench)[0]
    assert peak <= planned <= 1.03 * (peak + bytes_of_a_result(sizes))


def test_64_edits_of_low_rank_take_less_than_eight_others(at_8b):
    """No copy of a matrix is made, neither while they are learnt nor of their results."""
    peak = at_8b["64 edits of low rank"]["peak"] / GIB
    assert peak == pytest.approx(17.48, rel=0.01) and peak < at_8b["8 edits"]["peak"] / GIB


@pytest.mark.parametrize(("kept", "goal"), [("exact", 20.7), ("tolerance 0.1", 1.13), ("tolerance 0.1, at most", 1.66)])
def test_what_an_edit_of_8b_takes_on_disk(kept, goal):
    assert saved_bytes(shapes_of_layer(), *SAVED[kept]) / 1e6 == pytest.approx(goal, rel=0.01)


def test_a_saved_edit_takes_what_is_counted(tokenizer, tmp_path):
    """Beside its header and its card, as many rows of every projection."""
    model = tiny.make_model("llama", dtype=torch.float32)
    weights = {name: value.shape for name, value in select_parameters(model, [1]).items()}
    give_input_moments(model, {name.removesuffix(".weight"): torch.eye(shape[1]) for name, shape in weights.items()})
    settings = EditSettings([1], num_inner_steps=1, inner_step="whitened", positions="subject")
    edit = compute_edit(model, tokenizer, EditRequest("Ann Lee lives in", "Peru", "Ann Lee"), settings)
    edit.save(tmp_path / "edit")
    file = tmp_path / "edit" / "edit_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    [rank] = {len(a) for a, _ in edit.factors.values()}
    assert file.stat().st_size - header == saved_bytes(weights, dict.fromkeys(PROJECTIONS, rank), 4)


@pytest.mark.parametrize(
    ("name", "more", "goal"),
    [
        ("task", {}, 19.65),
        ("4 tasks", {"tasks_per_step": 4}, 27.6),
        ("4 tasks of low rank", {"tasks_per_step": 4, "inner_step": "whitened", "positions": "subject"}, 19.14),
        ("4 tasks of rank 16", {"tasks_per_step": 4, "rank": 16}, 15.03),
    ],
)
def test_a_dry_run_says_what_meta_training_takes(at_8b, plan, name, more, goal):
    peak = at_8b[name]["peak"] / GIB
    assert cost.run_bytes(replace(plan, **more), 100) / GIB == pytest.approx(peak, rel=0.03)
    assert peak == pytest.approx(goal, rel=0.01)


def test_an_edit_of_8b_keeps_to_its_launches_and_waits_only_at_its_end(at_8b):
    """2,337 a step; what is read is whether all numbers are finite, the first and last loss, and what the edit is known by."""
    counts = at_8b["edit"]
    assert counts["launches"] <= 5150
    assert (counts["reads"], counts["to_host"], counts["to_device"]) == (1, 4, 4)


def test_second_moments_of_memits_layers_grow_on_a_gpu_of_24_gb(at_8b):
    """Five sums of 0.77 GiB beside the model of 15; each is copied to the host once, at the end, and no batch is waited for."""
    counts = at_8b["statistics"]
    assert counts["peak"] / GIB == pytest.approx(19.35, rel=0.01)
    assert (counts["reads"], counts["to_host"]) == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_inner_step_waits_for_the_device(small, family, kind):
    """A run of three steps against one of two."""
    two, three = (small[f"{family} {kind} {steps}"] for steps in (2, 3))
    assert all(two[what] == three[what] for what in ("reads", "to_host", "to_device"))
    assert 0 < three["launches"] - two["launches"] <= LAUNCHES_A_STEP[family]


class CountReads(TorchDispatchMode):
    """Numbers taken out of tensors, and shapes that depend on them: what a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.reads += function._schema.name in (*READS, *UNKNOWN_SIZES)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("num_tasks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_is_read_in_a_task_of_real_tensors(family, num_tasks, tokenizer):
    """transformers skips some reads where it sees a tensor without numbers; here all have theirs. Texts of different length."""
    model = tiny.make_model(family, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    parameters = select_parameters(model, [1])
    encoder = TextEncoder(tokenizer)
    target = encode_requests(encoder, [[EditRequest("Ann Lee lives in", "Peru" * n)] for n in range(1, num_tasks + 1)])
    related = collate([encoder.encode_answer("What is the capital? It is", "Lima" * n) for n in range(1, num_tasks + 1)])
    settings = EditSettings(layers=[1], num_inner_steps=3)
    with only_trainable(model, parameters), CountReads() as counting:
        outer_loss = partial(compute_answer_loss, batch=related, num_edits=num_tasks)
        gradients = compute_task_gradients(model, parameters, target, outer_loss, settings, num_tasks)
        assert counting.reads == 0
        gradients.related_losses.sum().item()  # what is counted
    assert counting.reads == 1


@pytest.mark.parametrize("name", SPREAD)
def test_a_model_may_be_spread_over_two_devices(spread, name):
    """What is on one device and meets what is on the other raises; no state goes through the host."""
    assert spread[name]["launches"] > 100 and spread[name]["to_device"] <= 8
