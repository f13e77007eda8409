"""Seconds and memory a task of meta-training: the engine against the plain loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from propmeta_edit.finetune.buffers import kept_buffers
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.metatrain.task_texts import encode_step
from propmeta_edit.metatrain.tasks import order_tasks
from propmeta_edit.metatrain.trainer import compute_step_gradients, own_buffers
from propmeta_edit.models.devices import free_unused, peak_memory, wait_for
from propmeta_edit.models.layers import MODULE_CHOICES, select_parameters
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import MetaTask
from propmeta_edit.speed import parts, reference
from propmeta_edit.text.encoding import TextEncoder

REFERENCE, HIGHER, ENGINE = "reference", "higher", "engine"
_PLAIN_LOOPS = {REFERENCE: reference.task_gradients, HIGHER: reference.task_gradients_by_higher}


@dataclass(frozen=True)
class Side:
    """One way to meta-train a model.

    Args:
        kind: ``reference``, ``higher`` or ``engine``.
    """

    kind: str
    model_name: str
    device: str
    config: MetaTrainConfig

    def load(self) -> tuple[Any, Any]:
        return parts.load(self.model_name, self.device, self.config.dtype, self.config.layers or [], self.config.modules)

    def run(self, model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[MetaTask]) -> float:
        """Seconds a task, outer steps included."""
        parameters = select_parameters(model, self.config.layers, self.config.modules)
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.config.outer_lr, fused=self.kind == ENGINE)
        size = self.config.tasks_per_step
        wait_for(model.device)
        started = time.perf_counter()
        try:
            with only_trainable(model, parameters), kept_buffers(own_buffers(self.config, model.device)):
                for start in range(0, len(tasks), size):
                    self._step(model, tokenizer, parameters, optimizer, tasks[start : start + size])
            wait_for(model.device)
            return (time.perf_counter() - started) / len(tasks)
        finally:
            optimizer.zero_grad()  # where memory ran out, gradients are left

    def _step(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        tasks: Sequence[MetaTask],
    ) -> None:
        """One outer step."""
        if self.kind == ENGINE:
            encoded = encode_step(TextEncoder(tokenizer, model.config), tasks, self.config)
            apply_outer_step(optimizer, parameters, compute_step_gradients(model, parameters, encoded, self.config))
            return
        own = [_PLAIN_LOOPS[self.kind](model, tokenizer, parameters, task, self.config.edit)[0] for task in tasks]
        reference.outer_step(optimizer, parameters, own)


def read_tasks(number: int) -> list[MetaTask]:
    return order_tasks([case.as_task() for case in parts.read_cases(number)], 0, number)


def compare(
    model_name: str, device: str, dtype: str, steps: Sequence[int], layers: Sequence[int] | None, num_tasks: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """All measurements on one model: tasks a step and dtype, then other layers and modules at the best setting."""
    depth = parts.depth_of(model_name)
    chosen = list(layers or [depth // 4, 0, depth - 1])
    tasks = read_tasks(num_tasks)
    base = MetaTrainConfig(model=model_name, layers=chosen[:1], inner_lr=1e-3, outer_lr=1e-4, dtype="float32")
    best = replace(base, dtype=dtype, tasks_per_step=max(steps))
    plans = [(base, steps)] + ([(replace(base, dtype=dtype), steps)] if dtype != "float32" else [])
    plans += [(replace(best, layers=[layer]), [max(steps)]) for layer in chosen[1:]]
    plans += [(replace(best, modules=modules), [max(steps)]) for modules in MODULE_CHOICES[:2]]
    for config, sizes in plans:
        yield from _against_reference(model_name, device, config, sizes, tasks, repeats)


def _against_reference(
    model_name: str, device: str, config: MetaTrainConfig, sizes: Sequence[int], tasks: Sequence[MetaTask], repeats: int
) -> Iterator[dict[str, Any]]:
    sides = [Side(kind, model_name, device, replace(config, tasks_per_step=1)) for kind in _PLAIN_LOOPS]
    sides += [Side(ENGINE, model_name, device, replace(config, tasks_per_step=size)) for size in sizes]
    free_unused()  # the model before
    loaded = parts.run_if_it_fits(sides[0].load)  # one model for all: no side depends on the values of its weights
    names = {f"{side.kind} {side.config.tasks_per_step}": side for side in sides}
    runs = {name: partial(side.run, *loaded) for name, side in names.items()} if loaded else {}
    times = parts.measure({name: partial(run, tasks) for name, run in runs.items()}, repeats)
    usual = {name: timing.usual for name, timing in times.items()}
    for name, side in names.items():
        peak = shares = None
        if name in times:
            whole, one_step = partial(runs[name], tasks), partial(runs[name], tasks[: side.config.tasks_per_step])
            peak = parts.run_if_it_fits(partial(peak_memory, whole, torch.device(device)))
            shares = parts.run_if_it_fits(partial(parts.share_of_time, one_step, torch.device(device)))
        yield {
            "model": model_name,
            "side": side.kind,
            "layer": config.layers[0] if config.layers else None,
            "modules": config.modules,
            "frozen dtype": config.dtype,
            "tasks a step": side.config.tasks_per_step,
            "seconds a task": usual.get(name),
            "seconds once": times[name].once(len(tasks)) if name in times else None,
            "times reference": parts.ratio(usual.get(f"{REFERENCE} 1"), usual.get(name)),
            "peak GiB added": peak,
            **(shares or {}),
            "note": "" if peak is not None and shares is not None else parts.NO_MEMORY,
        }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Two ratios, on the model of the last row: the best setting against the plain loop in fp32, and one task a step in fp32.

    What is not known is None: it was not measured yet, or did not fit into memory.
    """
    first = [row for row in rows if row["model"] == rows[-1]["model"]]
    same = [row for row in first if (row["layer"], row["modules"]) == (first[0]["layer"], first[0]["modules"])]
    plain = [row for row in same if row["frozen dtype"] == "float32"]
    reference: Mapping[str, Any] = next((row for row in plain if row["side"] == REFERENCE), {})
    engine = [row for row in same if row["side"] == ENGINE and row["seconds a task"] is not None]
    best = min(engine, key=lambda row: row["seconds a task"], default={})
    one = min((row for row in plain if row["side"] == ENGINE), key=lambda row: row["tasks a step"], default={})
    return {
        "model": first[0]["model"],
        "engine_vs_reference": parts.ratio(reference.get("seconds a task"), best.get("seconds a task")),
        "best": {key: best.get(key) for key in ("frozen dtype", "tasks a step", "seconds a task")},
        "engine_vs_reference_one_task": one.get("times reference"),
    }


def check_growth(model_name: str, device: str, dtype: str, num_tasks: int) -> list[dict[str, Any]]:
    """Seconds and added memory at N, 2N and 4N tasks; None where they do not fit into memory."""
    layer = parts.depth_of(model_name) // 4
    config = MetaTrainConfig(model=model_name, layers=[layer], inner_lr=1e-3, outer_lr=1e-4, dtype=dtype, tasks_per_step=4)
    side = Side(ENGINE, model_name, device, config)
    loaded = parts.run_if_it_fits(side.load)
    if loaded:
        parts.run_if_it_fits(partial(side.run, *loaded, read_tasks(4)))
    rows = []
    for factor in (1, 2, 4):
        many = read_tasks(num_tasks) * factor
        seconds = peak = None
        if loaded:
            run = partial(side.run, *loaded, many)
            seconds = parts.run_if_it_fits(run)
            if seconds is not None:
                peak = parts.run_if_it_fits(partial(peak_memory, run, torch.device(device)))
        rows.append({"tasks": len(many), "seconds": seconds and seconds * len(many), "peak GiB added": peak})
    return rows
