"""The meta-training runs that a study makes: one checkpoint each, under a name that everything that decides it is hashed into."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.files import sha256_of_json
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun, kept_state, unclaimed_removed
from propmeta_edit.metatrain.trainer import Stopped, meta_train
from propmeta_edit.models.artefacts import find_model_folder, resolve_model_folder
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, model_sha256, read_checkpoint_card, read_model_config
from propmeta_edit.recipes.meta_training import (
    hash_of_tasks,
    load_tasks,
    logged_to,
    resolve,
    stopped_by_signals,
    train_to_folder,
    training_folder,
)
from propmeta_edit.store import require_made_from


def name_of_run(config: MetaTrainConfig) -> str:
    """A folder name that tells runs of resolved settings apart, by eye and by hash: alike on every device, where the dtype is."""
    layers = config.layers if isinstance(config.layers, str) else "-".join(str(layer) for layer in config.layers or [])
    model = re.sub(r"[^\w.-]+", "-", config.model.strip("/"))[-40:]
    tasks = config.num_tasks or "all"
    return f"{model}_layer-{layers or 'default'}_{config.modules}_{tasks}-tasks_{sha256_of_json(config.decisive)[:8]}"


def folder_of_run(config: MetaTrainConfig, study: Path) -> Path:
    """Where a study's run leaves its checkpoint."""
    return study / "checkpoints" / name_of_run(resolve(config))


def ensure_run(config: MetaTrainConfig, study: Path) -> Path:
    """The checkpoint of a run, meta-trained first if it is not there (a run that was stopped continues).

    Raises:
        OriginError: the checkpoint that is there was made of other data, another base, or with other settings.
    """
    checkpoint = folder_of_run(config, study)
    if checkpoint.is_dir():
        require_same_origin(config, checkpoint)
    else:
        train_to_folder(config, checkpoint)
    return checkpoint


def require_same_origin(config: MetaTrainConfig, checkpoint: Path) -> None:
    """Whether a checkpoint's card says what a run would write into it today.

    A folder's name knows the paths of data and base; what is in them may have changed since. A base whose weights are not on this
    machine, which a plan does without, is not compared.

    Raises:
        OriginError: naming what differs.
    """
    card = read_checkpoint_card(checkpoint)
    before = {**card["settings"], "tasks_sha256": card["tasks_sha256"], "base_sha256": card["base_sha256"]}
    now = {**resolve(config).decisive, "tasks_sha256": read_tasks(config)[1]}
    folder = find_model_folder(config.model)
    if folder is not None and any(folder.glob("*.safetensors")):
        now["base_sha256"] = hash_of_model(config.model)
    what = f"was meta-trained (tasks: of {config.data}, base: {config.model}),"
    remedy = "choose another --output, or delete this folder and the rows of it"
    require_made_from(now, before, checkpoint, what, remedy)


def state_after(checkpoint: Path, num_tasks: int) -> Path:
    """The trained tensors that a finished run kept after so many tasks.

    Raises:
        ConfigError: it kept none there.
    """
    file = kept_state(checkpoint / "training", num_tasks)
    if not file.is_file():
        raise ConfigError(f"{checkpoint} keeps no state after {num_tasks} tasks; checkpoint_every must divide it")
    return file


def train_until(config: MetaTrainConfig, study: Path, num_tasks: int) -> Path:
    """The trained tensors of a run after so many of its tasks; it is trained so far and no further, and goes on from there later.

    Args:
        num_tasks: a multiple of ``config.checkpoint_every``.

    Raises:
        OriginError: the folder of the run belongs to one with other settings.
        DataError: fewer tasks than that.
        Stopped: by SIGTERM or Ctrl-C, before it was there.
    """
    training = training_folder(folder_of_run(config, study))
    tasks, _ = load_tasks(config)
    if len(tasks) < num_tasks:
        raise DataError(
            f"has {len(tasks)} tasks, and {num_tasks} are wanted; begin with fewer, or name fewer candidates", config.data
        )
    base = resolve_model_folder(config.model)
    sums = {"base_sha256": model_sha256(base), "tasks_sha256": hash_of_tasks(tasks)}
    run, done = TrainingRun(training, {**config.decisive, **sums}, config.rounding), [0]
    file = kept_state(training, num_tasks)
    if file.is_file():
        return file
    where: dict[str, Any] = {"layers": config.layers, "modules": config.modules}
    with (
        unclaimed_removed(training),
        logged_to(training / "log.txt"),
        stopped_by_signals() as is_asked_to_stop,
        suppress(Stopped),
    ):
        model, tokenizer = load_model(base, device=config.device, dtype=config.dtype, **where)
        meta_train(
            model,
            tokenizer,
            tasks,
            replace(config, validate_every=None),
            run,
            should_stop=lambda: done[-1] >= num_tasks or is_asked_to_stop(),
            report=lambda number, losses: done.append(number),
        )
    if not file.is_file():
        raise Stopped(done[-1], num_tasks)
    return file


def training_seconds(model: str, num_tasks: int | None = None) -> dict[str, float]:
    """``meta-training``: the seconds of a checkpoint's meta-training, if its card knows them.

    Args:
        num_tasks: of its first tasks alone: their share of the whole, since a run keeps no times on the way.
    """
    card = read_checkpoint_card(resolve_model_folder(model))
    if "seconds" not in card:
        return {}
    if num_tasks is None:
        return {"meta-training": card["seconds"]}
    return {"meta-training": round(num_tasks / card["num_tasks"] * card["seconds"], 1)}


def read_tasks(config: MetaTrainConfig) -> tuple[int, str]:
    """How many tasks a run learns from, and their hash; read once for all runs that differ in the model and its trained tensors."""
    same = replace(config, model="", layers=None, modules="attention+mlp", device="cpu", dtype="float32")
    return _read_tasks(json.dumps(asdict(same), sort_keys=True))


@cache
def _read_tasks(settings: str) -> tuple[int, str]:
    tasks, _ = load_tasks(MetaTrainConfig(**json.loads(settings)))
    return len(tasks), hash_of_tasks(tasks)


@cache
def hash_of_model(model: str) -> str:
    """The hash of a model's weights, read once."""
    return model_sha256(resolve_model_folder(model))


@cache
def shape_of(model: str) -> Any:
    """A model's tensors without their memory, from its ``config.json`` alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_model_config(model))


def check_trainable(configs: Iterable[MetaTrainConfig]) -> None:
    """Refuse what cannot be trained before hours are spent on the rest.

    Raises:
        ModelError: an unsupported architecture, a layer outside the model, or unknown modules.
    """
    for config in configs:
        select_parameters(shape_of(config.model), config.layers, config.modules)


def runs_of(configs: Iterable[MetaTrainConfig | None]) -> dict[str, MetaTrainConfig]:
    """The runs that these make necessary, each once, by name."""
    return {name_of_run(resolve(config)): config for config in configs if config is not None}


def runs_left(runs: dict[str, MetaTrainConfig], study: Path) -> dict[str, MetaTrainConfig]:
    """Those that are not there yet."""
    return {name: config for name, config in runs.items() if not (study / "checkpoints" / name).is_dir()}


def require_runs_fit(runs: dict[str, MetaTrainConfig], study: Path) -> None:
    """Refuse checkpoints that are there but were made of something else, before hours are spent on the others.

    Raises:
        OriginError: naming what differs.
    """
    for name, config in runs.items():
        if (study / "checkpoints" / name).is_dir():
            require_same_origin(config, study / "checkpoints" / name)


def share_of(names: Sequence[str], number: int, count: int) -> set[str]:
    """Which of some names are for machine ``number`` of ``count``, the first being 1."""
    return {name for place, name in enumerate(dict.fromkeys(names)) if place % count == number - 1}
