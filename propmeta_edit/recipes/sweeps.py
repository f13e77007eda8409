"""Many meta-trained variants of a model, each edited and asked on the same cases: what Table 1 and Figures 2 to 4 are made of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from propmeta_edit.config import build_config
from propmeta_edit.easyedit.hparams import MetaFTHyperParams, edit_settings_of
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.evaluation.methods import Editing, FineTuning
from propmeta_edit.evaluation.rows import PROTOCOL, Row, RowFile, select_rows
from propmeta_edit.evaluation.runner import DataSet, MethodSpec, choose_cases
from propmeta_edit.files import sha256_of_file, sha256_of_json
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import kept_state, read_kept_state
from propmeta_edit.models.artefacts import find_model_folder
from propmeta_edit.models.layers import num_parameters, resolve_layers, select_parameters
from propmeta_edit.models.loading import DTYPES, read_checkpoint_card, read_model_config
from propmeta_edit.recipes.comparison import hash_of_model, read_training_time
from propmeta_edit.recipes.meta_training import (
    EDITS_AT_ONCE,
    hash_of_tasks,
    load_tasks,
    measure_seconds_a_task,
    resolve,
    train_to_folder,
    training_bytes,
)


@dataclass(frozen=True)
class Point:
    """One variant.

    Args:
        label: its name in rows and tables.
        config: how it is meta-trained, and with which inner loop it is edited.
        is_meta_trained: False for the base with the same inner loop.
        num_tasks: of a meta-trained one: its state after so many tasks, from a checkpoint on the schedule; None for the end.
    """

    label: str
    config: MetaTrainConfig
    is_meta_trained: bool = True
    num_tasks: int | None = None


def make_point_spec(point: Point, folder: Path) -> MethodSpec:
    """A variant as a row, meta-trained in ``folder`` first if it is not there yet (a run that was stopped continues).

    Raises:
        ConfigError: a number of tasks for which the run keeps no checkpoint.
        DataError: the checkpoint that is there was made of other data, another base, or with other settings.
    """
    config = resolve(point.config)
    model, weights = config.model, None
    if point.is_meta_trained:
        checkpoint = folder / "checkpoints" / name_of_run(config)
        if checkpoint.is_dir():
            _require_same_origin(config, checkpoint)
        else:
            train_to_folder(config, checkpoint)
        model = str(checkpoint)
        if point.num_tasks is not None:
            weights = kept_state(checkpoint / "training", point.num_tasks)
            if not weights.is_file():
                raise ConfigError(f"{checkpoint} keeps no state after {point.num_tasks} tasks; checkpoint_every must divide it")
    values = {**edit_settings_of(asdict(config)), "model_name": model, "device": config.device, "dtype": config.dtype}
    hparams = build_config(MetaFTHyperParams, values, point.label)
    identity = {**hparams.edit.to_dict(), "dtype": config.dtype}
    identity["weights"] = None if weights is None else sha256_of_file(weights)
    meta_training = asdict(config) if point.is_meta_trained else {"model": config.model}
    return MethodSpec(
        name=point.label,
        model=model,
        model_sha256=hash_of_model(model),
        hparams_sha256=sha256_of_json(identity),
        build=partial(_build, hparams, weights),
        dtype=config.dtype,
        device=config.device,
        cases_at_once=EDITS_AT_ONCE,
        precomputation=_training_time_until(point.num_tasks, model) if point.is_meta_trained else {},
        settings={**meta_training, **identity},
    )


def _training_time_until(num_tasks: int | None, model: str) -> dict[str, float]:
    """Seconds of a meta-training, or of its first tasks: their share of the whole, since a run keeps no times on the way."""
    seconds = read_training_time(model)
    if num_tasks is None:
        return seconds
    share = num_tasks / read_checkpoint_card(model)["num_tasks"]
    return {what: round(share * value, 1) for what, value in seconds.items()}


def _build(hparams: MetaFTHyperParams, weights: Path | None) -> FineTuning:
    model, tokenizer = hparams.load_model()
    if weights is not None:
        apply_snapshot(dict(model.named_parameters()), read_kept_state(weights))
    one = Editing(model, tokenizer, apply_metaft_to_model, hparams)
    return FineTuning(model, tokenizer, one, hparams.edit)


def name_of_run(config: MetaTrainConfig) -> str:
    """A folder name that tells runs of a sweep apart, by eye and by hash: alike on every device, where the dtype is."""
    layers = config.layers if isinstance(config.layers, str) else "-".join(str(layer) for layer in config.layers or [])
    model = re.sub(r"[^\w.-]+", "-", config.model.strip("/"))[-40:]
    tasks = config.num_tasks or "all"
    return f"{model}_layer-{layers or 'default'}_{config.modules}_{tasks}-tasks_{sha256_of_json(config.decisive)[:8]}"


def require_runs_fit(points: Sequence[Point], folder: Path) -> None:
    """Refuse checkpoints that are there but were made of something else, before hours are spent on the others.

    A folder's name knows the paths of data and base; what is in them may have changed since.

    Raises:
        DataError: naming what differs.
    """
    for name, config in _runs_of(points).items():
        if (folder / "checkpoints" / name).is_dir():
            _require_same_origin(resolve(config), folder / "checkpoints" / name)


def _require_same_origin(config: MetaTrainConfig, checkpoint: Path) -> None:
    """Whether a checkpoint's card says what a run would write into it today."""
    card = read_checkpoint_card(checkpoint)
    before = {**card["settings"], **{name: card.get(name) for name in ("tasks_sha256", "base_sha256")}}
    now = {**config.decisive, "tasks_sha256": read_tasks(config)[1], "base_sha256": _hash_of_base(config.model)}
    other = [
        f"{name} {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value and (name, value) != ("base_sha256", None)
    ]
    if other:
        raise DataError(
            f"was meta-trained from something else ({'; '.join(other)}; tasks: of {config.data}, base: {config.model}); choose "
            "another --output, or delete this folder and the rows of it",
            checkpoint,
        )


def _hash_of_base(model: str) -> str | None:
    """None for a base whose weights are not on this machine, which a plan does without."""
    folder = find_model_folder(model)
    return hash_of_model(model) if folder is not None and any(folder.glob("*.safetensors")) else None


def read_tasks(config: MetaTrainConfig) -> tuple[int, str]:
    """How many tasks a run learns from, and their hash; read once for all runs that differ in the model and its trained tensors."""
    same = replace(config, model="", layers=None, modules="attention+mlp", device="cpu", dtype="float32")
    return _read_tasks(json.dumps(asdict(same), sort_keys=True))


@cache
def _read_tasks(settings: str) -> tuple[int, str]:
    tasks, _ = load_tasks(MetaTrainConfig(**json.loads(settings)))
    return len(tasks), hash_of_tasks(tasks)


def check_points(points: Sequence[Point]) -> None:
    """Refuse variants that cannot be trained, from the models' ``config.json`` alone, before hours are spent on others.

    Raises:
        ModelError: an unsupported architecture, a layer outside the model, or unknown modules.
    """
    for point in points:
        select_parameters(_shape_of(point.config.model), point.config.layers, point.config.modules)


@cache
def _shape_of(model: str) -> Any:
    """A model's tensors without their memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_model_config(model))


def require_rows_fit(points: Sequence[Point], datasets: Sequence[DataSet], rows: RowFile, folder: Path, seed: int) -> None:
    """Refuse to go on in a folder whose rows other settings made, before anything is meta-trained for it.

    Raises:
        DataError: naming what differs.
    """
    for point in points:
        own = [row for row in rows.rows if row.method == point.label]
        if not own:
            continue
        _require_same_run(point, own, rows.path)
        run = _run_of(point)
        is_ready = not point.is_meta_trained or (folder / "checkpoints" / run).is_dir()
        # What is still to be meta-trained cannot be hashed: its weights are taken to become those of its rows.
        known: MethodSpec | Row = make_point_spec(point, folder) if is_ready else own[0]
        for data in datasets:
            settings = (known.model_sha256, data.sha256, known.hparams_sha256, seed, PROTOCOL)
            rows.require_same_settings(point.label, data.name, settings)


def _require_same_run(point: Point, own: Sequence[Row], path: Path) -> None:
    other = next((Path(row.model).name for row in own if Path(row.model).name != _run_of(point)), None)
    if point.is_meta_trained and other is not None:
        raise DataError(
            f"holds rows of {point.label} made by the run {other}, but the settings now are those of {_run_of(point)}; choose "
            "another --output, or remove those rows",
            path,
        )


def share_of(points: Sequence[Point], number: int, count: int) -> list[Point]:
    """The variants of one machine of ``count``, the first being 1; those of one meta-training run stay together."""
    runs = list(dict.fromkeys(_run_of(point) for point in points))
    return [point for point in points if runs.index(_run_of(point)) % count == number - 1]


def _run_of(point: Point) -> str:
    return name_of_run(resolve(point.config)) if point.is_meta_trained else point.label


def _runs_of(points: Sequence[Point]) -> dict[str, MetaTrainConfig]:
    return {_run_of(point): point.config for point in points if point.is_meta_trained}


def runs_left(points: Sequence[Point], folder: Path) -> dict[str, MetaTrainConfig]:
    """The meta-training runs of a sweep that are not there yet, by name."""
    return {name: config for name, config in _runs_of(points).items() if not (folder / "checkpoints" / name).is_dir()}


def measure_runs(runs: Mapping[str, MetaTrainConfig]) -> dict[str, float]:
    """Seconds a task of each run whose model is on this machine, from a few steps: timed once a model and choice of modules, at the
    lowest of its layers, which takes longest."""
    lowest: dict[tuple[str, str], MetaTrainConfig] = {}
    for config in runs.values():
        key = (config.model, config.modules)
        if find_model_folder(config.model) is not None and (key not in lowest or _first_layer(config) < _first_layer(lowest[key])):
            lowest[key] = config
    seconds = {key: measure_seconds_a_task(config) for key, config in lowest.items()}
    keys = {name: (config.model, config.modules) for name, config in runs.items()}
    return {name: seconds[key] for name, key in keys.items() if key in seconds}


def _first_layer(config: MetaTrainConfig) -> int:
    return min(resolve_layers(config.layers, read_model_config(config.model).num_hidden_layers))


def estimate_sweep(points: Sequence[Point], folder: Path, seconds_of: Mapping[str, float], tasks_of: Mapping[str, int]) -> str:
    """What of a sweep is there and what is left, one line a meta-training run.

    Args:
        seconds_of, tasks_of: seconds a task, where they are known, and tasks of the runs that are left.
    """
    left = runs_left(points, folder)
    minutes = {name: seconds_of[name] * tasks_of[name] / 60 for name in left if name in seconds_of}
    sizes = {name: checkpoint_bytes(config, tasks_of[name]) / 2**30 for name, config in left.items()}
    memory = {name: run_bytes(config, tasks_of[name]) / 2**30 for name, config in left.items()}
    lines = [f"{name}: there" for name in _runs_of(points) if name not in left]
    for name in left:
        time = (
            f"about {minutes[name]:.0f} min" if name in minutes else "time not known, since its model is not here: --seconds-a-task"
        )
        lines.append(f"{name}: {tasks_of[name]} tasks, {time}, {sizes[name]:.1f} GiB, {memory[name]:.1f} GiB of memory at least")
    unknown = f" and {len(left) - len(minutes)} runs of unknown time" if len(minutes) < len(left) else ""
    free = (
        shutil.disk_usage(next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())).free / 2**30
    )
    lines.append(
        f"{len(points)} variants to edit and ask; about {sum(minutes.values()):.0f} min of meta-training are left{unknown}."
    )
    lines.append(f"Checkpoints to come take {sum(sizes.values()):.1f} GiB; {free:.0f} GiB of disk are free.")
    return "\n".join(lines)


def checkpoint_bytes(config: MetaTrainConfig, num_tasks: int) -> int:
    """The size of a run's checkpoint: the base's tensors as stored, the trained ones in fp32, and the states kept on the way."""
    shape = _shape_of(config.model)
    trained = num_parameters(select_parameters(shape, config.layers, config.modules))
    stored = getattr(shape.config, "dtype", None) or torch.float32
    kept = num_tasks // config.checkpoint_every if config.checkpoint_every else 0
    return int(sum(p.numel() for p in shape.parameters()) * stored.itemsize + trained * (4 - stored.itemsize) + 4 * trained * kept)


def run_bytes(config: MetaTrainConfig, num_tasks: int) -> int:
    """The memory of a run: the frozen tensors in its dtype, the trained ones in fp32, and what training holds besides."""
    config, shape = resolve(config), _shape_of(config.model)
    trained = num_parameters(select_parameters(shape, config.layers, config.modules))
    itemsize = DTYPES[config.dtype].itemsize
    model: int = sum(p.numel() for p in shape.parameters()) * itemsize + trained * (4 - itemsize)
    return model + training_bytes(trained, config, num_tasks)


def choose_best(labels: Sequence[str], dataset: str, rows: Sequence[Row]) -> tuple[str | None, str]:
    """The variant that is right most often on the cases that all of them were asked (a tie goes to the first), and a note.

    None where one was not asked yet, where they share no case, or where a case failed: it counts as wrong, which says nothing about
    the variant. The note is for the reader of a table; "" where there is nothing to say.
    """
    own = {label: select_rows(rows, label, dataset) for label in labels}
    if not all(own.values()):
        return None, ""
    failed = {label: number for label, some in own.items() if (number := sum(row.error is not None for row in some))}
    if failed:
        counts = ", ".join(f"{number} of {label}" for label, number in failed.items())
        note = f"nothing is chosen, since cases failed ({counts}); mend the cause and give the same command with --retry-failed"
        return None, note
    shared = set.intersection(*({row.case_id for row in some} for some in own.values()))
    if not shared:
        return None, "nothing is chosen, since no case was asked of all variants"
    right = {label: sum(row.correct for row in some if row.case_id in shared) for label, some in own.items()}
    is_partly = any(len(some) > len(shared) for some in own.values())
    note = f"chosen by the n = {len(shared)} cases that all were asked" if is_partly else ""
    return max(right, key=right.__getitem__), note


def estimate_asking(wanted: Sequence[tuple[str, DataSet]], rows: Sequence[Row], limit: int, seed: int) -> str:
    """How many cases are left to ask, and how long that takes by the rows on disk.

    Args:
        wanted: the variants' labels, each with a data set that it is asked; "" for one that is still to be chosen.
    """
    chosen = {data.name: choose_cases(data.cases, limit, seed) for _, data in wanted}
    keys = [(label, data.name, case.case_id) for label, data in wanted for case in chosen[data.name]]
    known = {row.key: row for row in rows}
    left = sum(key not in known for key in keys)
    seconds = [row.seconds for key in keys if (row := known.get(key)) is not None and row.seconds is not None]
    time = (
        f"about {left * fmean(seconds) / 60:.0f} min by the {len(seconds)} rows on disk"
        if seconds
        else "time known after some rows"
    )
    return f"{left} cases are left to ask: {time}."
