"""What a comparison would run and cost, said before any model is loaded, prepared or downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit.algorithms import BASELINES, NEEDS_STATISTICS, default_layers
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import DataSet, choose_cases
from propmeta_edit.models.artefacts import BUNDLED, find_model_folder
from propmeta_edit.recipes.comparison import METHODS, RowKind, Setup
from propmeta_edit.recipes.settings import has_hparams, hparams_file

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Seconds a case, edits and questions, by what edits: where no row has been timed yet. On the bundled model and two CPU cores.
TYPICAL_SECONDS = {
    "": 0.5,
    "in-context": 0.5,
    "MetaFT": 2,
    "FT": 5,
    "LoRA": 30,
    "MEMIT": 24,
    "AlphaEdit": 26,
    "ROME": 20,
    "CaKE": 36,
}
TYPICAL_PARAMETERS = 134.5e6


@dataclass(frozen=True)
class _Shape:
    """What memory is estimated from."""

    num_parameters: int
    num_layers: int
    key_width: int


def describe_plan(
    names: Sequence[str],
    setup: Setup,
    hparams_name: str,
    datasets: Sequence[DataSet],
    rows: RowFile,
    limit: int | None,
    limits: Mapping[str, int],
    minutes_per_row: float | None = None,
) -> str:
    """One line a row of the table: where its model is, cases done and left, memory, and time left by the rows on disk.

    Memory is of weights and of what the method adds to them; activations are on top. Without a timed row, time is guessed from the
    model's size.

    Args:
        minutes_per_row: after which a row stops, those on disk counted; no estimate is longer.
    """
    lines = [f"{'row':<27}{'model':<34}{'cases left':>16}{'memory':>10}{'disk':>10}  time left"]
    total, guessed = 0.0, 0.0
    for name in names:
        kind = METHODS[name]
        model = setup.model_of(kind)
        shape = _read_shape(model) or _read_shape(setup.model)
        picked = {data.name: kind.adapt(choose_cases(data.cases, limits.get(name, limit), setup.seed)) for data in datasets}
        chosen = [(data, case.case_id) for data, cases in picked.items() for case in cases]
        finished = {(row.dataset, row.case_id): row for row in rows.rows if row.method == name}
        left = sum(key not in finished for key in chosen)
        seconds = [row.seconds for row in finished.values() if row.seconds is not None]
        each = fmean(seconds) if seconds else _guess_seconds(kind, shape)
        needed = None if each is None else left * each
        if minutes_per_row is not None and left:
            unused = max(0.0, 60 * minutes_per_row - sum(seconds))
            needed = unused if needed is None else min(needed, unused)
        total += needed or 0.0
        guessed += 0.0 if seconds else needed or 0.0
        memory, disk = _estimate(kind, setup, shape, hparams_name) if shape else (None, None)
        lines.append(
            f"{name:<27}{model + _state_of(model):<34}{f'{left} of {len(chosen)}':>16}{_gib(memory):>10}{_gib(disk):>10}  "
            + ("none" if not left else _say_time(needed, is_guess=not seconds))
        )
    free = shutil.disk_usage(rows.path.parent).free / GIB
    lines += [
        "",
        f"on {setup.device}; {free:.0f} GiB of disk are free; {_minutes(total)} in all, {_minutes(guessed)} of it guessed.",
    ]
    lines.append(
        "Time comes from finished rows. A guess is that of two CPU cores, in proportion to the model's parameters (a GPU takes a "
        "fraction): run with --limit 2 first. No model was touched."
    )
    return "\n".join(lines)


def _guess_seconds(kind: RowKind, shape: _Shape | None) -> float | None:
    """Of a case; None for a model whose size is not known."""
    return None if shape is None else TYPICAL_SECONDS[kind.edit] * shape.num_parameters / TYPICAL_PARAMETERS


def _say_time(seconds: float | None, is_guess: bool) -> str:
    if seconds is None:
        return "not known yet"
    return _minutes(seconds) + (" (a guess)" if is_guess else "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min"


def _state_of(model: str) -> str:
    if find_model_folder(model) is not None:
        return ""
    return " (to prepare)" if model in BUNDLED else " (to fetch)"


@cache
def _read_shape(model: str) -> _Shape | None:
    """Sizes from a model's own configuration; None if it is not on this machine."""
    folder = find_model_folder(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # shapes without memory
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    return _Shape(count, config.num_hidden_layers, getattr(config, "intermediate_size", 4 * config.hidden_size))


def _estimate(kind: RowKind, setup: Setup, shape: _Shape, hparams_name: str) -> tuple[float, float]:
    """(memory, disk) in GiB."""
    weights: float = shape.num_parameters * BYTES[setup.dtype_of(kind)]
    per_layer = shape.num_parameters / shape.num_layers  # embeddings counted in: an upper bound
    has_own = has_hparams(kind.hparams_folder, hparams_name)
    own = read_yaml(hparams_file(kind.hparams_folder, hparams_name)) if has_own else kind.varies
    given = own.get("layers")
    layers = default_layers(kind.edit, shape.num_layers) if given is None else given
    num_layers = len(layers) if isinstance(layers, list) and layers else shape.num_layers if layers == "all" else 1
    moment = 4 * shape.key_width**2 * num_layers
    disk = 0.0
    if kind.edit == "MetaFT":  # fp32: the values of before, and of each edit the weights, their gradient and two moments
        weights += (1 + 4 * setup.edits_at_once) * 4 * per_layer * num_layers
    elif kind.edit in NEEDS_STATISTICS:  # second moments; projections and kept keys for AlphaEdit
        weights, disk = weights + (3 if kind.edit == "AlphaEdit" else 1) * moment, (2 if kind.edit == "AlphaEdit" else 1) * moment
    elif kind.edit in ("CaKE", "LoRA"):  # the values of before
        weights += 4 * shape.num_parameters
    elif kind.edit in BASELINES:
        weights += 4 * per_layer * num_layers
    return weights / GIB, disk / GIB


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} GiB" if value else "–"
