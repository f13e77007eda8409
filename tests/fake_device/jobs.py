"""The real edits and the real meta-training on a device without numbers, at the shapes of Llama-3-8B or of a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from accelerate import dispatch_model
from device import NAME, Counts, FakeDevice

from propmeta_edit import compute_edit, edit_many
from propmeta_edit.baselines.second_moments import collect_second_moments
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import find_whiteners, give_input_moments, require_input_moments
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.trainer import meta_train
from propmeta_edit.models.factors import attach_factors
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import cast_around, get_architecture, get_block_list, select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question

LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
REQUEST = EditRequest("Ann Lee is a citizen of", "Peru", "Ann Lee")  # 12 tokens
ROOM = 22.5 * 2**30  # what a GPU of 24 GB has at least
TEXTS = ["Ann Lee is a citizen of Peru. " * 100] * 16  # two batches of 4,096 tokens
RELATED = Question("What is the capital of the country that Ann Lee is a citizen of?", ("Lima",))


# Ranks of an edit of MetaFT-bound (ten steps at its subject's tokens), and bytes of a number: means over 48 validation facts of the
# offline world on the bundled model, as the factors are and at a tolerance of 0.1, and the most that any of them needed.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAVED = {
    "exact": (dict.fromkeys(PROJECTIONS, 63.3), 4),
    "tolerance 0.1": (dict(zip(PROJECTIONS, (2.0, 2.5, 3.2, 8.8, 7.2, 7.1, 10.1), strict=True)), 2),
    "tolerance 0.1, at most": (dict(zip(PROJECTIONS, (4, 5, 6, 14, 11, 10, 13), strict=True)), 2),
}


def saved_bytes(weights: Mapping[str, torch.Size], ranks: Mapping[str, float], bytes_a_number: int) -> float:
    """Of the factors of an edit of these matrices, by the last part of their names."""
    return bytes_a_number * sum(ranks[name.split(".")[-2]] * sum(shape) for name, shape in weights.items())


def shapes_of_layer() -> dict[str, torch.Size]:
    """Of Llama-3-8B's, one's matrices."""
    return {name: value.shape for name, value in select_parameters(make_model(Job()), [9]).items()}


@dataclass(frozen=True)
class Job:
    """One run of the real code.

    Args:
        at_once: edits side by side, or tasks of an outer step.
        family: of the model; ``llama3-8b`` for the shapes of that one, else a tiny model's.
        layer: that is edited or trained; a list of them is.
        steps: K.
        rank: of factors that are trained in place of the matrices.
        inner_step: whitened steps are taken at the subject's tokens; the inverse moments are there before the run.
        split: the first layer on a second device, where the last norm and the head are too; accelerate brings the states there, as
            under transformers' ``device_map="auto"``.
    """

    kind: str = "edit"
    at_once: int = 1
    family: str = "llama3-8b"
    layer: int | list[int] = 9
    steps: int = 10
    rank: int | None = None
    inner_step: str = "adamw"
    split: int | None = None

    @property
    def layers(self) -> list[int]:
        return [self.layer] if isinstance(self.layer, int) else self.layer

    @property
    def how(self) -> dict[str, Any]:
        """Settings of the inner step."""
        return {"inner_step": self.inner_step, "positions": "all" if self.inner_step == "adamw" else "subject"}

    @property
    def name(self) -> str:
        if self.kind == "statistics":
            return f"statistics of {len(self.layers)} layers"
        of_low_rank = " of low rank" if self.inner_step == "whitened" else ""
        return f"{self.at_once} {self.kind}{'s' if self.at_once > 1 else ''}{of_low_rank}"


MEMIT_LAYERS = [4, 5, 6, 7, 8]
JOBS = [Job("edit", 1), Job("edit", 8), Job("edit", 64), Job("task", 1), Job("task", 4)]
JOBS += [Job(job.kind, job.at_once, inner_step="whitened") for job in JOBS]
JOBS += [Job("statistics", layer=MEMIT_LAYERS)]


def make_model(job: Job) -> Any:
    """On torch's meta device: the layer in fp32, the rest in bf16."""
    with torch.device("meta"):
        if job.family == "llama3-8b":
            config_class, model_class = tiny.CLASSES["llama"]
            model = model_class(config_class(**LLAMA3_8B)).to(torch.bfloat16)
        else:
            model = tiny.make_model(job.family, dtype=torch.bfloat16)
        model.set_attn_implementation("sdpa")
        if job.rank is not None:
            attach_factors(model, job.layers, "attention+mlp", job.rank)
            return model.eval()
        if job.kind == "statistics":
            return model.eval()
        for name, parameter in select_parameters(model, job.layers).items():
            module = model.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], torch.nn.Parameter(parameter.float()))
            cast_around(module)
        return model.eval()


def run_job(job: Job) -> Counts:
    """What one run asks of the device. Of meta-training it is the second outer step, which has the optimiser's moments."""
    model, tokenizer = make_model(job), tiny.make_tokenizer()
    with (
        FakeDevice() as device,
        torch.autograd.set_multithreading_enabled(False),  # torch believes in one such device, and would have a thread for that one
        mock.patch("propmeta_edit.models.ownership.require_whole"),  # it would refuse tensors without numbers, and nothing else
        mock.patch.object(FakeTensor, "tolist", lambda self: self.cpu().tolist()),  # as a GPU's: not one number after the other
        mock.patch("torch.tensor", lambda *given, device=None, **more: _make_tensor(*given, **more).to(device)),
    ):
        device.put(model)
        if job.split is not None:
            _spread(model, job.split, device)
        if job.inner_step == "whitened":
            _give_moments(model, job.layers)
        device.restart()
        _KINDS[job.kind](job, model, tokenizer, device)
    return device.counts


_make_tensor = torch.tensor


def _give_moments(model: Any, layers: list[int]) -> None:
    """Their inverses are on the device; they themselves would be on the host, as read from a file, and are given up here."""
    names = [name for name in select_parameters(model, layers) if name.endswith(".weight")]
    modules = {name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight")) for name in names}
    widths = {path: module.weight.shape[0 if type(module).__name__ == "CastingConv1D" else 1] for path, module in modules.items()}
    read: dict[tuple[str, bool, int], torch.Tensor] = {}  # queries, keys and values read the same; so do gate and up
    for path, width in widths.items():
        read.setdefault(_input_of(path, width), torch.eye(width, device=model.device))
    give_input_moments(model, {path: read[_input_of(path, width)] for path, width in widths.items()})
    find_whiteners(model, names, EditSettings().damping)
    require_input_moments(model, names).moments.update(dict.fromkeys(widths, torch.zeros(0)))


def _input_of(path: str, width: int) -> tuple[str, bool, int]:
    return path.rpartition(".")[0], path.endswith("o_proj"), width


def _spread(model: Any, split: int, device: FakeDevice) -> None:
    first, second = f"{NAME}:0", f"{NAME}:1"
    architecture = get_architecture(model)
    body = architecture.blocks.rpartition(".")[0]
    places = dict.fromkeys((name for name, _ in model.named_children() if name != body), second)
    places |= {f"{body}.{name}": first for name, _ in model.get_submodule(body).named_children()}
    places |= {f"{architecture.blocks}.{n}": first if n < split else second for n in range(len(get_block_list(model)))}
    places[architecture.final_norm] = second
    del places[architecture.blocks]
    for name, place in places.items():
        device.put(model.get_submodule(name), place)
    dispatch_model(model, places, main_device=first)


def _ask(job: Job, model: Any, tokenizer: Any, device: FakeDevice) -> None:
    generate_greedily(model, tokenizer, ["Ann Lee is a citizen of", "The capital of France is"], max_new_tokens=job.steps)


def _edit(job: Job, model: Any, tokenizer: Any, device: FakeDevice) -> None:
    settings = EditSettings(layers=job.layers, num_inner_steps=job.steps, **job.how)
    if job.at_once == 1:
        compute_edit(model, tokenizer, REQUEST, settings)
    else:
        edit_many(model, tokenizer, [REQUEST] * job.at_once, settings, at_once=job.at_once)


def _meta_train(job: Job, model: Any, tokenizer: Any, device: FakeDevice) -> None:
    tasks = [MetaTask(f"t{n}", REQUEST, RELATED) for n in range(2 * job.at_once)]
    about = {"layers": job.layers, "num_inner_steps": job.steps, "tasks_per_step": job.at_once, **job.how}
    config = MetaTrainConfig("m", dtype="bfloat16", **about)

    def restart_after_the_first(num_done: int, numbers: dict[str, float]) -> None:
        if num_done < len(tasks):
            device.restart()

    meta_train(model, tokenizer, tasks, config, report=restart_after_the_first)


def _gather(job: Job, model: Any, tokenizer: Any, device: FakeDevice) -> None:
    with mock.patch("propmeta_edit.baselines.second_moments.free_memory", lambda _: ROOM - device.counts.live):
        collect_second_moments(model, tokenizer, TEXTS, job.layers)


_KINDS: dict[str, Callable[..., None]] = {"edit": _edit, "task": _meta_train, "question": _ask, "statistics": _gather}
