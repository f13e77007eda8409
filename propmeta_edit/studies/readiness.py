"""What a row needs besides texts and base, held against what is here before anything is built: for a plan, and before a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.easyedit.algorithms import BASELINES, NEEDS_STATISTICS, fill_layers
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.errors import ModelError, PropMetaError
from propmeta_edit.models.artefacts import find_model_folder, may_be_had, resolve_model_folder
from propmeta_edit.models.layers import resolve_layers, select_parameters
from propmeta_edit.recipes.statistics import require_statistics
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.studies.runs import shape_of
from propmeta_edit.studies.variants import Bench, Variant, read_settings


def require_ready(variant: Variant, bench: Bench) -> None:
    """Refuse a row whose YAML, layers, checkpoint, second moments or EasyEdit are missing or do not fit; nothing is fetched.

    Raises:
        ConfigError, ModelError, EasyEditError: naming the file, and what makes it.
    """
    if variant.training is not None:  # its settings are of one piece, and were checked with the run
        return
    model = bench.model_of(variant)
    if variant.edit in BASELINES:
        find_form()
    folder = find_model_folder(model)
    if folder is None:
        if not may_be_had(model):
            _require_checkpoint(variant, model, bench)
        if variant.checkpoint:  # what it was meta-trained with is known when it is there
            return
    settings = read_settings(variant, bench)
    if folder is None or not settings or not (folder / "config.json").is_file():
        return
    settings = fill_layers(variant.edit, settings, model)
    try:
        _require_layers(variant, settings, shape_of(model))
    except ModelError as error:
        raise ModelError(f"{variant.name}, by {_source(variant, bench, folder)}: {error}") from error
    if variant.edit in NEEDS_STATISTICS:
        require_statistics(model, settings)


def describe_missing(variant: Variant, bench: Bench) -> str | None:
    """What ``require_ready`` says of a row; None where it can run."""
    try:
        require_ready(variant, bench)
    except PropMetaError as error:
        return str(error)
    return None


def _require_checkpoint(variant: Variant, model: str, bench: Bench) -> None:
    """Refuse a model that is nowhere, with the command that makes a meta-tuned one."""
    needed = bench.model if variant.checkpoint and not Path(model).is_dir() else model
    if find_model_folder(needed) is None and not may_be_had(needed):
        resolve_model_folder(needed)  # says what models there are, or which base a difference is from
    option = "--metaft-model FOLDER" if variant.checkpoint == "metaft" else f"--checkpoints {variant.checkpoint}=FOLDER"
    raise ModelError(
        f"there is no meta-tuned checkpoint {model}, which {variant.name} needs; name one with {option}, or make it with: "
        f"propmeta-edit meta-train --model {bench.model} --data <CRE's training file> --output {model}"
    )


def _require_layers(variant: Variant, settings: Mapping[str, Any], shape: Any) -> None:
    layers, depth = settings.get("layers"), shape.config.num_hidden_layers
    if variant.edit not in BASELINES:
        select_parameters(shape, layers, settings.get("modules", "attention+mlp"))
    elif layers is not None:
        resolve_layers([int(layer) for layer in layers], depth)
    if settings.get("v_loss_layer") is not None:
        resolve_layers([int(settings["v_loss_layer"])], depth)


def _source(variant: Variant, bench: Bench, folder: Path) -> str:
    """The file that a row's settings are from."""
    method = variant.hparams or variant.edit
    if method != "MetaFT" and has_hparams(method, bench.hparams, bench.hparams_dir):
        return str(hparams_file(method, bench.hparams, bench.hparams_dir))
    return str(folder)
