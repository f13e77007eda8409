"""What meta-training, edits and questions take in time, memory and disk: behind every ``--plan`` and ``--dry-run``.

Memory is of weights and of what training or editing adds to them; activations are on top.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit.algorithms import BASELINES, NEEDS_STATISTICS, default_layers
from propmeta_edit.errors import ModelError
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import DataSet, choose_cases
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.learning import Learning
from propmeta_edit.finetune.memory import (
    FP32,
    bytes_of_a_result,
    bytes_of_edits,
    bytes_of_factors,
    bytes_of_training,
    bytes_of_whiteners,
)
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.metatrain.task_texts import encode_step, tasks_side_by_side
from propmeta_edit.metatrain.trainer import compute_step_gradients, describe_learning, read_task_learning
from propmeta_edit.models.artefacts import BUNDLED, find_model_folder
from propmeta_edit.models.devices import wait_for
from propmeta_edit.models.differences import DIFFERENCE
from propmeta_edit.models.layers import resolve_layers, select_parameters
from propmeta_edit.models.loading import DTYPES, load_model, read_checkpoint_card, read_model_config
from propmeta_edit.recipes.bundled import CARD, read_card, shipped_folder
from propmeta_edit.recipes.meta_training import load_tasks, resolve
from propmeta_edit.records import MetaTask
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.studies.runs import read_tasks, runs_left, runs_of, shape_of
from propmeta_edit.studies.variants import Bench, Variant
from propmeta_edit.text.encoding import TextEncoder

GIB = 2**30
ENOUGH_SECONDS = 10  # of timing: warming up is a small part of a step that takes so long
# Seconds a case, edits and questions, by what edits: where no row has been timed yet. On the bundled model and two CPU cores.
TYPICAL_SECONDS = {
    "": 0.5,
    "in-context": 0.5,
    "newest object": 0,
    "commonest answer": 0,
    "MetaFT": 2,
    "FT": 5,
    "LoRA": 30,
    "MEMIT": 24,
    "AlphaEdit": 26,
    "ROME": 20,
    "CaKE": 36,
}
TYPICAL_PARAMETERS = 134.5e6
HOW_TIME_IS_KNOWN = (
    "Time comes from finished rows. A guess is that of two CPU cores, in proportion to the model's parameters (a GPU takes a "
    "fraction): run with --limit 2 first. No row was started."
)


# One meta-training run


def run_bytes(config: MetaTrainConfig, num_tasks: int) -> int:
    """The memory of a run: the frozen tensors in its dtype, the trained ones in fp32, and what training holds besides."""
    config = resolve(config)
    a_step = min(config.tasks_per_step, num_tasks)
    at_once = tasks_side_by_side(config, a_step)
    where = shape_of(config.model), config.layers, config.modules
    of_tasks = _bytes_of_edits(*where, config.rank, config.edit, at_once, max(config.sizes))
    return _model_bytes(config) + bytes_of_training(_trained_of(config), of_tasks, in_turns=at_once < a_step)


def _bytes_of_edits(
    shape: Any,
    layers: Sequence[int] | str | None,
    modules: str,
    rank: int | None,
    settings: EditSettings,
    at_once: int,
    num_facts: int = 1,
) -> int:
    """What edits side by side hold beside the model, inverse second moments included where their steps need them."""
    sizes = _sizes_of(shape, layers, modules, rank)
    if not settings.is_low_rank:
        return bytes_of_edits(sizes, at_once)
    shapes = {name: tuple(parameter.shape) for name, parameter in select_parameters(shape, layers, modules).items()}
    is_input_first = any(isinstance(module, Conv1D) for module in shape.modules())
    of_factors = at_once * bytes_of_factors(shapes, settings, num_facts)
    return bytes_of_whiteners(shapes, is_input_first) + of_factors + bytes_of_a_result(sizes)


def _model_bytes(config: MetaTrainConfig) -> int:
    return _bytes_of_model(shape_of(config.model), _trained_of(config), DTYPES[config.dtype].itemsize, config.rank)


def _bytes_of_model(shape: Any, trained: Sequence[int], itemsize: int, rank: int | None = None) -> int:
    """Trained tensors in fp32 in place of the frozen ones, or beside them if they are factors."""
    frozen: int = itemsize * sum(p.numel() for p in shape.parameters())
    return frozen + sum(trained) - (itemsize * sum(trained) // FP32 if rank is None else 0)


def checkpoint_bytes(config: MetaTrainConfig, num_tasks: int) -> int:
    """The size of a run's checkpoint: the base's tensors as stored, the trained ones in fp32, and the states kept on the way; of
    factors these alone."""
    shape, trained = shape_of(config.model), _trained_of(config)
    stored = getattr(shape.config, "dtype", None) or torch.float32
    kept = num_tasks // config.checkpoint_every if config.checkpoint_every else 0
    whole = _bytes_of_model(shape, trained, stored.itemsize) if config.rank is None else sum(trained)
    return whole + sum(trained) * kept


def _trained_of(config: MetaTrainConfig) -> list[int]:
    return _sizes_of(shape_of(config.model), config.layers, config.modules, config.rank)


def _sizes_of(shape: Any, layers: Sequence[int] | str | None, modules: str, rank: int | None = None) -> list[int]:
    """Bytes of each tensor that is trained or edited, in fp32: the projections, or two factors in the place of each matrix."""
    chosen = select_parameters(shape, layers, modules)
    if rank is None:
        return [FP32 * parameter.numel() for parameter in chosen.values()]
    return [FP32 * rank * width for name, parameter in chosen.items() if name.endswith(".weight") for width in parameter.shape]


def describe_run(config: MetaTrainConfig, steps: int = 3) -> str:
    """What a run would do and cost, from a few timed steps that change nothing."""
    config = resolve(config)
    tasks, validation = load_tasks(config)
    seconds, learning = try_tasks(config, tasks, steps)
    trained = _trained_of(config)
    layers = resolve_layers(config.layers, shape_of(config.model).config.num_hidden_layers)
    at_once = tasks_side_by_side(config, min(config.tasks_per_step, len(tasks)))
    per_task = _fastest(seconds)
    lines = {
        "model": f"{config.model}, {config.dtype} on {config.device}, {_model_bytes(config) / GIB:.2f} GiB",
        "trained": f"layers {layers}, {config.modules}: {len(trained)} tensors, {sum(trained) / FP32 / 1e6:.2f} M numbers",
        "tasks": f"{len(tasks)}, {config.tasks_per_step} a step, {at_once} at once, K = {config.num_inner_steps}",
        "validation": ", ".join(f"{name} {len(cases)}" for name, cases in validation.items()) or "none",
        "memory": f"at least {run_bytes(config, len(tasks)) / GIB:.2f} GiB with all optimiser states",
        "time": f"{per_task:.2f} s a task, about {per_task * len(tasks) / 60:.0f} min and validation (from {len(seconds)} steps)",
    }
    if learning:
        lines["learning"] = describe_learning(learning, f"of {len(learning)} tasks")[1]
    return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def try_tasks(config: MetaTrainConfig, tasks: Sequence[MetaTask], steps: int = 3) -> tuple[list[float], list[Learning]]:
    """Seconds a task of each of a few whole steps, and how the inner loop of each task went; fewer steps where they take long.

    The outer step is taken at rate 0: it costs what it will, and every task starts at the same θ.
    """
    where: dict[str, Any] = {"layers": config.layers, "modules": config.modules}
    model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype, rank=config.rank, **where)
    parameters, encoder = select_parameters(model, **where), TextEncoder(tokenizer, model.config)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.0, weight_decay=config.weight_decay, fused=True)
    seconds: list[float] = []
    learning: list[Learning] = []
    begun = time.perf_counter()
    with only_trainable(model, parameters):
        for number in range(steps):
            some = tasks[number * config.tasks_per_step : (number + 1) * config.tasks_per_step] or tasks[: config.tasks_per_step]
            started = time.perf_counter()
            gradients = compute_step_gradients(model, parameters, encode_step(encoder, some, config), config)
            learning += read_task_learning(gradients, config.num_inner_steps)
            apply_outer_step(optimizer, parameters, gradients)
            wait_for(torch.device(config.device))
            seconds.append((time.perf_counter() - started) / len(some))
            if time.perf_counter() - begun > ENOUGH_SECONDS:
                break
    return seconds, learning


def _fastest(seconds: Sequence[float]) -> float:
    """Of the steps after the first, which warms everything up."""
    return min(seconds[1:] or seconds)


def measure_runs(runs: Mapping[str, MetaTrainConfig]) -> dict[str, float]:
    """Seconds a task of each run whose model is on this machine, from a few steps: timed once a model and choice of modules, at the
    lowest of its layers, which takes longest."""
    lowest: dict[tuple[str, str], MetaTrainConfig] = {}
    for config in runs.values():
        key = (config.model, config.modules)
        if find_model_folder(config.model) is not None and (key not in lowest or _first_layer(config) < _first_layer(lowest[key])):
            lowest[key] = config
    seconds = {}
    for key, config in lowest.items():
        config = resolve(config)
        seconds[key] = _fastest(try_tasks(config, load_tasks(config)[0])[0])
    keys = {name: (config.model, config.modules) for name, config in runs.items()}
    return {name: seconds[key] for name, key in keys.items() if key in seconds}


def _first_layer(config: MetaTrainConfig) -> int:
    return min(resolve_layers(config.layers, read_model_config(config.model).num_hidden_layers))


# A study


@dataclass(frozen=True)
class Asked:
    """Cases of a data set that a variant is asked.

    Args:
        variant: one of those ``name`` speaks of, where it is still to be chosen.
    """

    name: str
    variant: Variant
    data: DataSet
    is_to_choose: bool = False


def describe_plan(
    asked: Sequence[Asked],
    bench: Bench,
    rows: Sequence[Row],
    *,
    limit: int | None,
    limits: Mapping[str, int],
    minutes_per_row: float | None = None,
    seconds_a_task: float | None = None,
) -> str:
    """What of a study is there and what is left: its meta-training runs, then a line a variant, then the sums.

    Args:
        asked: every variant with every data set it is asked.
        rows: those on disk, which time is taken from; without one it is guessed.
        minutes_per_row: after which a variant stops, those on disk counted; no estimate is longer.
        seconds_a_task: of meta-training; measured on a few tasks of each model that is here if not given.
    """
    variants = list(dict.fromkeys(one.name for one in asked))
    lines = _describe_runs(asked, bench, seconds_a_task)
    width = max(27, *(len(name) + 2 for name in variants))
    lines.append(f"{'row':<{width}}{'model':<34}{'cases left':>16}{'memory':>10}{'disk':>10}  time left")
    costs = []
    for name in variants:
        own = [one for one in asked if one.name == name]
        cost = _cost_of_asking(own, bench, rows, limits.get(name, limit), minutes_per_row)
        costs.append(cost)
        lines.append(f"{name:<{width}}{cost.describe()}")
    free = shutil.disk_usage(next(place for place in (bench.folder.absolute(), *bench.folder.absolute().parents) if place.is_dir()))
    total, guessed = sum(cost.seconds or 0.0 for cost in costs), sum(cost.seconds or 0.0 for cost in costs if cost.is_guess)
    lines += [
        "",
        f"{sum(cost.num_left for cost in costs)} cases are left to ask: {_minutes(total)} in all, {_minutes(guessed)} guessed.",
        f"on {bench.device}; {free.free / GIB:.0f} GiB of disk are free. {HOW_TIME_IS_KNOWN}",
    ]
    return "\n".join(lines)


def _describe_runs(asked: Sequence[Asked], bench: Bench, seconds_a_task: float | None) -> list[str]:
    """A line for each meta-training run of a study, and their sum; nothing where it has none."""
    runs = runs_of(one.variant.run for one in asked)
    if not runs:
        return []
    left = runs_left(runs, bench.folder)
    seconds_of = measure_runs(left) if seconds_a_task is None else dict.fromkeys(left, seconds_a_task)
    tasks_of = {name: read_tasks(config)[0] for name, config in left.items()}
    minutes = {name: seconds_of[name] * tasks_of[name] / 60 for name in left if name in seconds_of}
    sizes = {name: checkpoint_bytes(config, tasks_of[name]) / GIB for name, config in left.items()}
    lines = [f"{name}: there" for name in runs if name not in left]
    for name, config in left.items():
        time_left = (
            f"about {minutes[name]:.0f} min" if name in minutes else "time not known, since its model is not here: --seconds-a-task"
        )
        memory = run_bytes(config, tasks_of[name]) / GIB
        lines.append(f"{name}: {tasks_of[name]} tasks, {time_left}, {sizes[name]:.1f} GiB, {memory:.1f} GiB of memory at least")
    unknown = f" and {len(left) - len(minutes)} runs of unknown time" if len(minutes) < len(left) else ""
    lines.append(f"about {sum(minutes.values()):.0f} min of meta-training are left{unknown}")
    return [*lines, f"checkpoints to come take {sum(sizes.values()):.1f} GiB", ""]


@dataclass(frozen=True)
class _AskingCost:
    """What is left of a variant; None for what is not known."""

    model: str
    num_left: int
    num_cases: int
    memory: float | None
    disk: float | None
    seconds: float | None
    is_guess: bool

    def describe(self) -> str:
        time_left = "none"
        if self.num_left:
            time_left = (
                "not known yet" if self.seconds is None else _minutes(self.seconds) + (" (a guess)" if self.is_guess else "")
            )
        cases = f"{self.num_left} of {self.num_cases}"
        return f"{self.model:<34}{cases:>16}{_gib(self.memory):>10}{_gib(self.disk):>10}  {time_left}"


def _cost_of_asking(
    own: Sequence[Asked], bench: Bench, rows: Sequence[Row], limit: int | None, minutes_per_row: float | None
) -> _AskingCost:
    if own[0].is_to_choose:
        return _cost_of_the_best(own, bench, limit)
    variant = own[0].variant
    model = bench.model_of(variant)
    adapted = {one.data.name: variant.adapt(choose_cases(one.data.cases, limit, bench.seed)) for one in own}
    chosen = {(name, case.case_id) for name, cases in adapted.items() for case in cases}
    finished = {(row.dataset, row.case_id): row.seconds for row in rows if row.method == variant.name}
    timed = [seconds for seconds in finished.values() if seconds is not None]
    each = fmean(timed) if timed else _guess_seconds(variant.edit, model, bench)
    left = len(chosen - finished.keys())
    seconds = None if each is None else left * each
    if minutes_per_row is not None and left:
        unused = max(0.0, 60 * minutes_per_row - sum(timed))
        seconds = unused if seconds is None else min(seconds, unused)
    memory, disk = estimate_memory(variant, bench)
    return _AskingCost(model + _state_of(model), left, len(chosen), memory, disk, seconds, is_guess=not timed)


def _cost_of_the_best(own: Sequence[Asked], bench: Bench, limit: int | None) -> _AskingCost:
    """Of a variant that is still to be chosen, which does not change how many cases it is asked."""
    number = sum(len(choose_cases(one.data.cases, limit, bench.seed)) for one in own)
    each = _guess_seconds(own[0].variant.edit, bench.model_of(own[0].variant), bench)
    return _AskingCost("", number, number, None, None, None if each is None else number * each, is_guess=True)


def _guess_seconds(edit: str, model: str, bench: Bench) -> float | None:
    """Of a case that is edited so; None for a model whose size is not known."""
    shape = _shape_here(model) or _shape_here(bench.model)
    if shape is None:
        return None
    size: int = sum(p.numel() for p in shape.parameters())
    return TYPICAL_SECONDS[edit] * size / TYPICAL_PARAMETERS


def _shape_here(model: str) -> Any | None:
    """A model's tensors without memory, if its configuration is on this machine."""
    folder = find_model_folder(model)
    return None if folder is None or not (folder / "config.json").is_file() else shape_of(model)


def estimate_memory(variant: Variant, bench: Bench) -> tuple[float | None, float | None]:
    """(memory, disk) of a variant in GiB: the weights and what its edits add to them; None where its model is not here."""
    shape = _shape_here(bench.model_of(variant)) or _shape_here(bench.model)
    if shape is None:
        return None, None
    layers, modules = _where(variant, bench, shape)
    rank = None if variant.training is None else variant.training.rank
    try:
        sizes = _sizes_of(shape, layers, modules, rank)
    except ModelError:  # layers that it does not have, which the plan says
        return None, None
    itemsize = DTYPES[bench.dtype_of(variant)].itemsize
    weights = _bytes_of_model(shape, [], itemsize)
    disk = 0
    if variant.edit == "MetaFT":
        settings = _settings_of_edit(variant, bench)
        of_edits = _bytes_of_edits(shape, layers, modules, rank, settings, bench.edits_at_once)
        weights = _bytes_of_model(shape, sizes, itemsize, rank) + of_edits
    elif variant.edit in NEEDS_STATISTICS:  # second moments; projections and kept keys for AlphaEdit
        width = getattr(shape.config, "intermediate_size", 4 * shape.config.hidden_size)
        moments = 4 * width**2 * len(resolve_layers(layers, shape.config.num_hidden_layers))
        weights, disk = (
            weights + (3 if variant.edit == "AlphaEdit" else 1) * moments,
            (2 if variant.edit == "AlphaEdit" else 1) * moments,
        )
    elif variant.edit in ("CaKE", "LoRA"):  # the values of before
        weights += 4 * sum(p.numel() for p in shape.parameters())
    elif variant.edit in BASELINES:
        weights += sum(sizes)
    return float(weights) / GIB, disk / GIB


def _where(variant: Variant, bench: Bench, shape: Any) -> tuple[Any, str]:
    """Layers and modules that a variant edits, as far as its settings say so without a model being looked into."""
    if variant.training is not None:
        return variant.training.layers, variant.training.modules
    folder = variant.hparams or variant.edit
    where = folder, bench.hparams, bench.hparams_dir
    own = read_yaml(hparams_file(*where)) if has_hparams(*where) else {}
    settings = {**own, **variant.settings}
    layers = settings.get("layers") or default_layers(variant.edit, shape.config.num_hidden_layers)
    return layers, settings.get("modules", "mlp" if variant.edit in BASELINES else "attention+mlp")


def _settings_of_edit(variant: Variant, bench: Bench) -> EditSettings:
    """As far as they are known without a model being made: a checkpoint's own, where it is at hand or its card comes with the
    package, else those of the paper's step."""
    if variant.training is not None:
        return variant.training.edit
    model = bench.model_of(variant)
    folder = find_model_folder(model) if variant.edits_as_trained else None
    card: dict[str, Any] = {}
    if folder is not None:
        card = read_checkpoint_card(folder)
    elif variant.edits_as_trained and (shipped_folder(model) / CARD).is_file():
        card = read_card(shipped_folder(model), DIFFERENCE)
    trained = card.get("settings", {})
    known = {field.name: trained[field.name] for field in fields(EditSettings) if field.name in trained}
    return EditSettings(**known)


def _state_of(model: str) -> str:
    if not model or find_model_folder(model) is not None:
        return ""
    return " (to prepare)" if model in BUNDLED else " (to fetch)"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min"


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} GiB" if value else "–"
