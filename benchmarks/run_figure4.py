"""Figure 4: accuracy against the trained layer, for several models; by depth, since they have different numbers of layers.

python benchmarks/run_figure4.py --models smollm2-135m,gemma3-270m --depths 0.1,0.2,0.3,0.5 --output results/figure4
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

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.models.loading import read_model_config
from propmeta_edit.recipes.sweeps import Point


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-ood")
    parser.add_argument("--depths", default="0.1,0.2,0.3,0.5", help="of the layers, as shares of the depth (default %(default)s)")
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """The layers that the depths mean for each model, read from its ``config.json``."""
    depths = sweep_parts.read_list(options.depths, "--depths", float)
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ConfigError(f"--depths must be shares from 0 to 1, got {wrong[0]}")
    points = []
    for model, config in sweep_parts.read_configs(options).items():
        number = read_model_config(config.model).num_hidden_layers
        layers = sorted({min(number - 1, round(depth * number)) for depth in depths})
        points += [Point(f"{model} layer {layer} of {number}", replace(config, layers=[layer])) for layer in layers]
    return points


def annotate(table: pd.DataFrame) -> None:
    parts = table["method"].str.extract(r"^(?P<model>\S+) layer (?P<layer>\d+) of (?P<number>\d+)$")
    table["model"], table["layer"] = parts["model"], parts["layer"].astype(int)
    table["depth"] = table["layer"] / parts["number"].astype(int)


def write(table: pd.DataFrame, rows: Sequence[Row], path: Path, notes: Sequence[str] = ()) -> str:
    return sweep_tables.write_figure(
        table, path, "depth", "model", "one layer", "layer, as a share of the depth", ["model", "layer"], notes
    )


SWEEP = sweep_parts.Sweep("figure4", make_points, annotate, write, lines="model", chosen_in="model")
main = sweep_parts.main_of(parse_arguments, SWEEP)

if __name__ == "__main__":
    sys.exit(main())
