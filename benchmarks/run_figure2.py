"""Figure 2: one layer at a time, attention, MLP or both; accuracy against the layer.

python benchmarks/run_figure2.py --layers 2,5,8,11,14 --output results/figure2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import sweep_parts
import sweep_tables

from propmeta_edit.evaluation.rows import Row
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.recipes.sweeps import Point


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-ood")
    parser.add_argument("--layers", required=True, help="0-based, comma-separated")
    parser.add_argument("--module-choices", default=",".join(MODULE_CHOICES), help="comma-separated (default %(default)s)")
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """Every layer with every choice of modules, model by model."""
    layers = sweep_parts.read_list(options.layers, "--layers", int)
    return [
        Point(f"{model} layer {layer} {modules}", replace(config, layers=[layer], modules=modules))
        for model, config in sweep_parts.read_configs(options).items()
        for modules in sweep_parts.read_list(options.module_choices, "--module-choices")
        for layer in layers
    ]


def annotate(table: pd.DataFrame) -> None:
    parts = table["method"].str.extract(r"^(?P<model>\S+) layer (?P<layer>\S+) (?P<modules>\S+)$")
    table["layer"], table["series"] = parts["layer"].astype(int), parts["model"] + " " + parts["modules"]


def write(table: pd.DataFrame, rows: Sequence[Row], path: Path, notes: Sequence[str] = ()) -> str:
    columns = ["series", "layer"]
    return sweep_tables.write_figure(table, path, "layer", "series", "one layer at a time", "layer", columns, notes)


SWEEP = sweep_parts.Sweep("figure2", make_points, annotate, write, lines="series", chosen_in="series")
main = sweep_parts.main_of(parse_arguments, SWEEP)

if __name__ == "__main__":
    sys.exit(main())
