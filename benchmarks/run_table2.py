"""Table 2: MetaFT against FT, ROME, in context and no edit, on two-hop questions about edited facts.

python benchmarks/run_table2.py --model smollm2-135m --limit 40 --output results/table2
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

import propmeta_edit
from propmeta_edit.cli import run_or_exit
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.mquake import bundled_mquake_path, load_mquake, load_mquake_subset
from propmeta_edit.easyedit.algorithms import find_algorithm, make_rome_contexts, make_rome_hparams
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.evaluation.methods import Editing, InContext, Unedited
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import DataSet, Method, MethodSpec, run_methods
from propmeta_edit.evaluation.tables import summarise, write_tables
from propmeta_edit.files import sha256_of_file, sha256_of_json
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.models.loading import DTYPES, load_model, model_sha256, read_checkpoint_card
from propmeta_edit.recipes import ensure_world, has_hparams, hparams_file

METHODS = ("unedited", "in-context", "FT", "ROME", "MetaFT")  # the base's rows together: it is loaded once
WORLD_FILES = {
    "cre-id": "test_data_id.jsonl",
    "cre-ood": "test_data_ood.jsonl",
    "cre-ood-entity": "test_data_ood-entity.jsonl",
    "cre-ood-relation": "test_data_ood-relation.jsonl",
}
LOADERS: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(WORLD_FILES, load_cre),
    "mquake-subset": load_mquake_subset,
    "mquake-4hop": load_mquake,
}
NOTES = [
    "accuracy: an accepted answer occurs in ten greedy tokens after `Question: ...\\nAnswer: The answer is`.",
    "efficacy: the edited fact itself occurs in ten greedy tokens after its prompt.",
    "s / edit: the edit call alone; loading, one warm-up edit, evaluation, restoring and the one-time meta-training are outside.",
    "FT is the inner loop on the base that was not meta-trained.",
    "cre-* without a file are facts generated offline in CRE's format, not the CRE release.",
]


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    model: str
    metaft_model: str
    device: str
    dtype: str
    seed: int


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base model: bundled name, folder or hub id (default %(default)s)")
    parser.add_argument("--metaft-model", help="its meta-tuned checkpoint (default: <model>-metaft)")
    parser.add_argument(
        "--hparams", help="name of the YAML in hparams/<method>/ (default: the model's name; else as the checkpoint was trained)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated rows (default %(default)s)")
    parser.add_argument(
        "--datasets",
        default="cre-id,cre-ood",
        help=f"comma-separated, each NAME, FILE or NAME=FILE; names: {', '.join(LOADERS)} (default %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="cases per data set (default: all); a larger one continues a smaller one")
    parser.add_argument(
        "--limits", default="", help="other numbers for single methods, e.g. ROME=8, since it is slow (comma-separated)"
    )
    parser.add_argument("--output", default="results/table2", help="folder for rows.jsonl and the tables (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="of the frozen rest (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be 1 or more, got {options.limit}")
    try:
        options.limits = {item.split("=")[0].strip(): int(item.split("=")[1]) for item in options.limits.split(",") if item.strip()}
    except (IndexError, ValueError):
        parser.error(f"--limits must be METHOD=NUMBER,..., got {options.limits!r}")
    if set(options.limits) - set(METHODS):
        parser.error(f"--limits names methods that are not among {', '.join(METHODS)}: {options.limits}")
    return options


def load_dataset(item: str, seed: int) -> DataSet:
    """``NAME``, ``NAME=FILE`` or ``FILE`` as cases; a bare file is CRE if it ends in .jsonl and MQuAKE if in .json."""
    name, _, file = item.partition("=")
    load = LOADERS.get(name)
    if Path(item).is_file():
        path = Path(item)
        known = {file: name for name, file in WORLD_FILES.items()}
        name, load = known.get(path.name, path.stem), load_cre if path.suffix == ".jsonl" else load_mquake
    elif load is None:
        raise DataError(f"unknown data set {name!r}; write an existing FILE, or NAME or NAME=FILE with one of {', '.join(LOADERS)}")
    elif file:
        path = Path(file)
    elif name in WORLD_FILES:
        path = ensure_world() / WORLD_FILES[name]
    elif name == "mquake-4hop":
        path = bundled_mquake_path()
    else:
        raise DataError(f"{name} does not come with the package: write {name}=MQuAKE-CF-3k-v2.json with the file you downloaded")
    cases = load(path, seed=seed) if load is load_cre else load(path)
    if not cases:
        raise DataError(f"no case of {name} in it", path)
    return DataSet(name, sha256_of_file(path), cases)


def make_specs(names: list[str], setup: Setup, hparams_name: str) -> list[MethodSpec]:
    """The chosen rows, nothing loaded yet (the models are prepared if they have to be)."""
    specs = []
    for name in names:
        model = setup.metaft_model if name == "MetaFT" else setup.model
        settings = read_settings(name, setup, hparams_name)
        identity = {**settings, "model_name": model, "device": setup.device, "dtype": setup.dtype}
        if name == "ROME":
            identity["easyedit"] = find_form().kind
        specs.append(
            MethodSpec(
                name=name,
                model=model,
                model_sha256=_hash_of(model),
                hparams_sha256=sha256_of_json(identity),
                build=partial(build_method, name, settings, model, setup),
                dtype=setup.dtype,
                device=setup.device,
            )
        )
    return specs


def read_settings(name: str, setup: Setup, hparams_name: str) -> dict[str, Any]:
    """A row's YAML; FT and MetaFT without one edit as the meta-tuned checkpoint says it was trained."""
    if name not in ("FT", "MetaFT", "ROME"):
        return {}
    if name != "ROME" and not has_hparams(name, hparams_name):
        trained = read_checkpoint_card(resolve_model_folder(setup.metaft_model))["settings"]
        same = {key: trained[key] for key in ("layers", "modules", "weight_decay", "loss_reduction")}
        return {**same, "alg_name": "MetaFT", "lr": trained["inner_lr"], "num_steps": trained["num_inner_steps"]}
    return read_yaml(hparams_file(name, hparams_name))


def require_same_base(setup: Setup) -> None:
    """FT and MetaFT differ by the meta-training alone, so the checkpoint must come from the base of the other rows.

    Raises:
        ConfigError: it comes from another one.
    """
    card = read_checkpoint_card(resolve_model_folder(setup.metaft_model))
    if card.get("base_sha256") != _hash_of(setup.model):
        raise ConfigError(
            f"{setup.metaft_model} was meta-trained from other weights ({card['base_model']}) than {setup.model} has; "
            "meta-train it anew from this base (a bundled one is rebuilt after removing its folder in the cache)"
        )


def build_method(name: str, settings: dict[str, Any], model: str, setup: Setup) -> Method:
    """Load what a row needs; the tensors it will edit are fp32 whatever the rest is."""
    if name in ("FT", "MetaFT"):
        values = {**settings, "model_name": model, "device": setup.device, "dtype": setup.dtype}
        hparams = build_config(MetaFTHyperParams, values, f"the settings of {name}")
        return Editing(*_loaded(model, hparams.layers, setup), apply_metaft_to_model, hparams)
    if name == "ROME":
        hparams = make_rome_hparams({**settings, "model_name": model, "device": setup.device})
        loaded = _loaded(model, hparams.layers, setup)
        make_rome_contexts(*loaded, hparams, setup.seed)
        return Editing(*loaded, find_algorithm("ROME"), hparams, one_by_one=True, padding_side="right")
    return {"unedited": Unedited, "in-context": InContext}[name](*_loaded(model, None, setup))


def _loaded(model: str, layers: list[int] | str | None, setup: Setup) -> tuple[Any, Any]:
    """In fp32 every row of a model can share it, since each edit is undone to the bit; else the edited layers differ."""
    edited = json.dumps(layers) if setup.dtype != "float32" else "null"
    return _load_one(model, edited, setup.device, setup.dtype)


@lru_cache(maxsize=1)  # one model in memory at a time
def _load_one(model: str, layers: str, device: str, dtype: str) -> tuple[Any, Any]:
    return load_model(model, device=device, dtype=dtype, layers=json.loads(layers))


@cache
def _hash_of(model: str) -> str:
    return model_sha256(resolve_model_folder(model))


def collect_versions(methods: list[str]) -> dict[str, str]:
    """What a row depends on besides its settings."""
    versions = {"python": platform.python_version(), "propmeta_edit": propmeta_edit.__version__}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "easyedit": find_form().kind} if "ROME" in methods else versions


def run(options: argparse.Namespace) -> int:
    """The whole comparison; returns how many cases failed."""
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigError(f"unknown methods {', '.join(unknown) or repr(options.methods)}; choose from {', '.join(METHODS)}")
    datasets = [load_dataset(item.strip(), options.seed) for item in options.datasets.split(",") if item.strip()]
    rows = RowFile(Path(options.output) / "rows.jsonl")
    versions = collect_versions(names)
    resolve_model_folder(options.model)
    metaft_model = options.metaft_model or f"{options.model.rstrip('/')}-metaft"
    setup = Setup(options.model, metaft_model, resolve_device(options.device), options.dtype, options.seed)
    if "MetaFT" in names:
        require_same_base(setup)
    specs = make_specs(names, setup, options.hparams or Path(options.model).name)
    failures = run_methods(specs, datasets, rows, limit=options.limit, limits=options.limits, seed=options.seed, versions=versions)
    in_order = sorted(rows.rows, key=lambda row: METHODS.index(row.method))
    print(write_tables(summarise(in_order), options.output, NOTES))
    if failures:
        print(f"{failures} cases failed; their tracebacks are in {rows.path}", file=sys.stderr)
    return failures


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 if cases failed, 2 for what the user can mend."""
    options = parse_arguments(argv)
    failures: list[int] = []
    code = run_or_exit(lambda: failures.append(run(options)))
    return code or int(bool(failures and failures[0]))


if __name__ == "__main__":
    sys.exit(main())
