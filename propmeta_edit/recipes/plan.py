"""What a comparison would run and cost, said before any model is loaded, prepared or downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit.algorithms import BASELINES, NEEDS_STATISTICS
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import DataSet, choose_cases
from propmeta_edit.models.artefacts import BUNDLED, artefact_folder, is_on_this_machine
from propmeta_edit.recipes.comparison import METHODS, RowKind, Setup
from propmeta_edit.recipes.settings import has_hparams, hparams_file

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
) -> str:
    """One line a row of the table: where its model is, cases done and left, memory, and time left by the rows on disk.

    Memory is of weights and of what the method adds to them; activations are on top.
    """
    lines = [f"{'row':<27}{'model':<34}{'cases left':>16}{'memory':>10}{'disk':>10}  time left"]
    total = 0.0
    for name in names:
        kind = METHODS[name]
        model = setup.model_of(kind)
        shape = _read_shape(model) or _read_shape(setup.model)
        picked = {data.name: kind.adapt(choose_cases(data.cases, limits.get(name, limit), setup.seed)) for data in datasets}
        chosen = [(data, case.case_id) for data, cases in picked.items() for case in cases]
        finished = {(row.dataset, row.case_id): row for row in rows.rows if row.method == name}
        left = sum(key not in finished for key in chosen)
        seconds = [row.seconds for row in finished.values() if row.seconds is not None]
        spent = left * fmean(seconds) if seconds else None
        total += spent or 0.0
        memory, disk = _estimate(kind, setup.dtype_of(kind), shape, hparams_name) if shape else (None, None)
        lines.append(
            f"{name:<27}{model + _state_of(model):<34}{f'{left} of {len(chosen)}':>16}{_gib(memory):>10}{_gib(disk):>10}  "
            + ("none" if not left else f"{spent / 60:.0f} min" if spent is not None else "not known yet")
        )
    free = shutil.disk_usage(rows.path.parent).free / GIB
    lines += ["", f"on {setup.device}; {free:.0f} GiB of disk are free; {total / 60:.0f} min where it is known."]
    lines.append("Time comes from finished rows: run with --limit 2 first where it is not known yet. No model was touched.")
    return "\n".join(lines)


def _state_of(model: str) -> str:
    return "" if is_on_this_machine(model) else " (to prepare)" if model in BUNDLED else " (to fetch)"


@cache
def _read_shape(model: str) -> _Shape | None:
    """Sizes from a folder's own configuration; None if it is not on this machine."""
    folder = artefact_folder(model) if model in BUNDLED else Path(model)
    if not (folder / "config.json").is_file():
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # shapes without memory
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    return _Shape(count, config.num_hidden_layers, getattr(config, "intermediate_size", 4 * config.hidden_size))


def _estimate(kind: RowKind, dtype: str, shape: _Shape, hparams_name: str) -> tuple[float, float]:
    """(memory, disk) in GiB."""
    weights: float = shape.num_parameters * BYTES[dtype]
    per_layer = shape.num_parameters / shape.num_layers  # embeddings counted in: an upper bound
    has_own = has_hparams(kind.hparams_folder, hparams_name)
    layers = read_yaml(hparams_file(kind.hparams_folder, hparams_name)).get("layers") if has_own else None
    num_layers = len(layers) if isinstance(layers, list) and layers else shape.num_layers if layers == "all" else 1
    moment = 4 * shape.key_width**2 * num_layers
    disk = 0.0
    if kind.edit == "MetaFT":  # fp32 weights, their gradient, two moments, and the values of before
        weights += 5 * 4 * per_layer * num_layers
    elif kind.edit in NEEDS_STATISTICS:  # second moments; projections and kept keys for AlphaEdit
        weights, disk = weights + (3 if kind.edit == "AlphaEdit" else 1) * moment, (2 if kind.edit == "AlphaEdit" else 1) * moment
    elif kind.edit in ("CaKE", "LoRA"):  # the values of before
        weights += 4 * shape.num_parameters
    elif kind.edit in BASELINES:
        weights += 4 * per_layer * num_layers
    return weights / GIB, disk / GIB


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} GiB" if value else "–"
