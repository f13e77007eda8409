"""Many meta-trained variants of a model, each edited and asked on the same cases: what Table 1 and Figures 2 to 4 are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from propmeta_edit.config import build_config
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.methods import Editing, FineTuning
from propmeta_edit.evaluation.runner import MethodSpec
from propmeta_edit.files import sha256_of_file, sha256_of_json
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import kept_state
from propmeta_edit.recipes.comparison import hash_of_model, read_training_time
from propmeta_edit.recipes.meta_training import EDITS_AT_ONCE, resolve, train_to_folder
from propmeta_edit.recipes.settings import edit_settings_of


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
    """
    config = resolve(point.config)
    model, weights = config.model, None
    if point.is_meta_trained:
        checkpoint = folder / "checkpoints" / name_of_run(config)
        if not checkpoint.is_dir():
            train_to_folder(config, checkpoint)
        model = str(checkpoint)
        if point.num_tasks is not None:
            weights = kept_state(checkpoint / "training", point.num_tasks)
            if not weights.is_file():
                raise ConfigError(f"{checkpoint} keeps no state after {point.num_tasks} tasks; checkpoint_every must divide it")
    values = {**edit_settings_of(asdict(config)), "model_name": model, "device": config.device, "dtype": config.dtype}
    hparams = build_config(MetaFTHyperParams, values, point.label)
    identity = {**asdict(hparams.inner_loop_settings()), "layers": config.layers, "modules": config.modules, "dtype": config.dtype}
    identity["weights"] = None if weights is None else sha256_of_file(weights)
    return MethodSpec(
        name=point.label,
        model=model,
        model_sha256=hash_of_model(model),
        hparams_sha256=sha256_of_json(identity),
        build=partial(_build, hparams, weights),
        dtype=config.dtype,
        device=config.device,
        cases_at_once=EDITS_AT_ONCE,
        precomputation=read_training_time(model) if point.is_meta_trained else {},
    )


def _build(hparams: MetaFTHyperParams, weights: Path | None) -> FineTuning:
    model, tokenizer = hparams.load_model()
    if weights is not None:
        apply_snapshot(dict(model.named_parameters()), load_file(weights))
    one = Editing(model, tokenizer, apply_metaft_to_model, hparams)
    return FineTuning(model, tokenizer, one, hparams.inner_loop_settings(), hparams.layers, hparams.modules)


def name_of_run(config: MetaTrainConfig) -> str:
    """A folder name that tells runs of a sweep apart, by eye and by hash."""
    layers = config.layers if isinstance(config.layers, str) else "-".join(str(layer) for layer in config.layers or [])
    model = re.sub(r"[^\w.-]+", "-", config.model.strip("/"))[-40:]
    tasks = config.num_tasks or "all"
    return f"{model}_layer-{layers or 'default'}_{config.modules}_{tasks}-tasks_{sha256_of_json(asdict(config))[:8]}"


def estimate_sweep(points: Sequence[Point], folder: Path, seconds_a_task: float, tasks_of: Mapping[str, int]) -> str:
    """What of a sweep is there and what is left, one line a meta-training run."""
    runs = {name_of_run(resolve(p.config)): p for p in points if p.is_meta_trained}
    lines, total = [], 0.0
    for name in runs:
        there = (folder / "checkpoints" / name).is_dir()
        minutes = 0.0 if there else seconds_a_task * tasks_of[name] / 60
        total += minutes
        lines.append(f"{name}: {'there' if there else f'about {minutes:.0f} min'}")
    return "\n".join([*lines, f"{len(points)} variants to edit and ask; about {total:.0f} min of meta-training are left."])
