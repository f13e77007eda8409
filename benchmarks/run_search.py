"""Settings for one row of Table 2, chosen on the validation splits: every combination gets the same time.

python benchmarks/run_search.py ROME layers=[3],[5] v_lr=0.1,0.5 --minutes 1.5 --output results/search
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from propmeta_edit.cli import exit_code_of
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import run_methods
from propmeta_edit.evaluation.tables import markdown_table, summarise, write_settings
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import DTYPES
from propmeta_edit.recipes.comparison import METHODS, Setup, collect_versions, hash_of_model, make_spec, read_settings
from propmeta_edit.recipes.data_sets import load_datasets


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("settings", nargs="*", help="NAME=VALUE,VALUE,... in YAML, e.g. layers=[3],[5]; the rest is the row's YAML")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default %(default)s)")
    parser.add_argument("--hparams", help="name of the YAML in hparams/<method>/ (default: the model's name)")
    parser.add_argument("--datasets", default="valid-id,valid-ood", help="default %(default)s; not a test split")
    parser.add_argument("--limit", type=int, help="cases of each data set at most (default: all)")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each combination, data sets by turns (default %(default)s)")
    parser.add_argument("--output", default="results/search", help="folder (default %(default)s); a stopped search continues there")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fast", choices=[*sorted(DTYPES), "fast"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_intermixed_args(argv)  # settings may stand after options as well


def read_grid(items: Sequence[str]) -> dict[str, list[Any]]:
    """``["v_lr=0.1,0.5"]`` → ``{"v_lr": [0.1, 0.5]}``.

    Raises:
        ConfigError: an item of another form.
    """
    grid = {}
    for item in items:
        name, equals, values = item.partition("=")
        try:
            grid[name] = [_as_number(value) for value in yaml.safe_load(f"[{values}]")]
        except yaml.YAMLError:
            grid[name] = []
        if not equals or not grid[name]:
            raise ConfigError(f"write settings as NAME=VALUE,VALUE,... in YAML, got {item!r}")
    return grid


def _as_number(value: Any) -> Any:
    """YAML takes 5e-1 for a word; it means a number here."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def name_combinations(method: str, grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination under the name of its row."""
    chosen = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return {" ".join([method, *(f"{name}={value}" for name, value in own.items())]): own for own in chosen}


def make_table(summary: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> str:
    """One line a combination, the best mean over the data sets first."""
    lines = []
    for method in dict.fromkeys(entry["method"] for entry in summary):
        own = {entry["dataset"]: entry for entry in summary if entry["method"] == method}
        found = [own[name] for name in datasets if name in own]
        mean = sum(entry["accuracy"] for entry in found) / len(found)
        cells = [f"{100 * e['accuracy']:.1f} ({100 * e['efficacy']:.0f}, n = {e['n']})" for e in found]
        lines.append((mean, [method, *cells, f"{100 * mean:.1f}"]))
    header = ["settings", *(f"{name}: accuracy % (efficacy %)" for name in datasets), "mean"]
    return markdown_table(header, [cells for _, cells in sorted(lines, reverse=True)])


def run(options: argparse.Namespace) -> int:
    """The search; returns how many cases failed."""
    device = resolve_device(options.device)
    setup = Setup(options.model, {}, device, resolve_dtype(options.dtype, device), options.seed, edits_at_once=8)
    kind = METHODS[options.method]
    settings = read_settings(kind, setup, options.hparams or Path(options.model).name)
    combinations = name_combinations(options.method, read_grid(options.settings))
    datasets = [data for item in options.datasets.split(",") for data in load_datasets(item.strip(), options.seed)]
    rows = RowFile(Path(options.output) / "rows.jsonl")
    specs = [make_spec(name, kind, {**settings, **own}, setup) for name, own in combinations.items()]
    versions = collect_versions([options.method])
    failures = run_methods(
        specs,
        datasets,
        rows,
        limit=options.limit,
        budget=60 * options.minutes,
        seed=options.seed,
        versions=versions,
    )
    given = {name: getattr(options, name) for name in ("datasets", "limit", "minutes", "seed")}
    shared = {"model_sha256": hash_of_model(setup.model_of(kind)), **given, "versions": versions}
    write_settings([replace(spec, settings={**spec.settings, **shared}) for spec in specs], options.output)
    names = [data.name for data in datasets]
    own = [row for row in rows.rows if row.method in combinations and row.dataset in names]
    table = make_table(summarise(own), names)
    write_text_atomically(rows.path.with_name("search.md"), table)
    print(table)
    return failures


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 if cases failed, 2 for what the user can mend."""
    options = parse_arguments(argv)
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
