"""Seconds and memory a task of meta-training: the engine against the plain loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import reference_loops
import speed_parts
import torch

from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.metatrain.trainer import compute_step_gradients, order_tasks
from propmeta_edit.models.layers import MODULE_CHOICES, select_parameters
from propmeta_edit.records import MetaTask

REFERENCE, HIGHER, ENGINE = "reference", "higher", "engine"
_PLAIN_LOOPS = {REFERENCE: reference_loops.task_gradients, HIGHER: reference_loops.task_gradients_by_higher}


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
        return speed_parts.load(
            self.model_name, self.device, self.config.dtype, list(self.config.layers or []), self.config.modules
        )

    def run(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask]) -> float:
        """Seconds a task, outer steps included."""
        parameters = select_parameters(model, self.config.layers, self.config.modules)
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.config.outer_lr, fused=self.kind == ENGINE)
        size = self.config.tasks_per_step
        speed_parts.wait_for(model.device)
        started = time.perf_counter()
        with only_trainable(model, parameters):
            for start in range(0, len(tasks), size):
                some = tasks[start : start + size]
                if self.kind == ENGINE:
                    apply_outer_step(optimizer, parameters, compute_step_gradients(model, tokenizer, parameters, some, self.config))
                    continue
                own = [_PLAIN_LOOPS[self.kind](model, tokenizer, parameters, task, self.config.inner)[0] for task in some]
                reference_loops.outer_step(optimizer, parameters, own)
        speed_parts.wait_for(model.device)
        return (time.perf_counter() - started) / len(tasks)


def read_tasks(number: int) -> list[MetaTask]:
    return order_tasks([case.as_task() for case in speed_parts.read_cases(number)], 0, number)


def compare(
    model_name: str, device: str, dtype: str, steps: Sequence[int], layers: Sequence[int] | None, num_tasks: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """All measurements on one model: tasks a step and dtype, then other layers and modules at the best setting."""
    depth = speed_parts.depth_of(model_name)
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
    loaded = sides[0].load()  # one model for all: no side depends on the values of its weights
    names = {f"{side.kind} {side.config.tasks_per_step}": side for side in sides}
    times = speed_parts.measure({name: lambda s=side: s.run(*loaded, tasks) for name, side in names.items()}, repeats)  # type: ignore[misc]
    for name, side in names.items():
        some = tasks[: side.config.tasks_per_step]
        yield {
            "model": model_name,
            "side": side.kind,
            "layer": (config.layers or [None])[0],
            "modules": config.modules,
            "frozen dtype": config.dtype,
            "tasks a step": side.config.tasks_per_step,
            "seconds a task": times[name],
            "times reference": times[f"{REFERENCE} 1"] / times[name],
            "peak GiB added": speed_parts.peak_memory(lambda s=side: s.run(*loaded, tasks), loaded[0].device),
            **speed_parts.share_of_time(lambda s=side, t=some: s.run(*loaded, t), loaded[0].device),  # type: ignore[misc]
        }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Two ratios, on the model of the last row: the best setting against the plain loop in fp32, and one task a step in fp32."""
    first = [row for row in rows if row["model"] == rows[-1]["model"]]
    same = [row for row in first if (row["layer"], row["modules"]) == (first[0]["layer"], first[0]["modules"])]
    reference = next(row for row in same if row["side"] == REFERENCE and row["frozen dtype"] == "float32")
    engine = [row for row in same if row["side"] == ENGINE]
    best = min(engine, key=lambda row: row["seconds a task"])
    one = min((row for row in engine if row["frozen dtype"] == "float32"), key=lambda row: row["tasks a step"])
    return {
        "model": best["model"],
        "engine_vs_reference": reference["seconds a task"] / best["seconds a task"],
        "best": {key: best[key] for key in ("frozen dtype", "tasks a step", "seconds a task")},
        "engine_vs_reference_one_task": one["times reference"],
    }


def check_growth(model_name: str, device: str, dtype: str, num_tasks: int) -> list[dict[str, Any]]:
    """Seconds and added memory at N, 2N and 4N tasks."""
    layer = speed_parts.depth_of(model_name) // 4
    config = MetaTrainConfig(model=model_name, layers=[layer], inner_lr=1e-3, outer_lr=1e-4, dtype=dtype, tasks_per_step=4)
    side = Side(ENGINE, model_name, device, config)
    loaded = side.load()
    side.run(*loaded, read_tasks(4))
    rows = []
    for factor in (1, 2, 4):
        many = read_tasks(num_tasks) * factor
        seconds = side.run(*loaded, many) * len(many)
        rows.append(
            {
                "tasks": len(many),
                "seconds": seconds,
                "peak GiB added": speed_parts.peak_memory(lambda m=many: side.run(*loaded, m), loaded[0].device),
            }
        )
    return rows
