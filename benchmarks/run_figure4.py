"""Figure 4: accuracy against the trained layer, for several models; by depth, since they have different numbers of layers.

python benchmarks/run_figure4.py --models smollm2-135m,gemma3-270m --depths 0.1,0.2,0.3,0.5 --output results/figure4
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import speed_parts
import sweep_parts

from propmeta_edit.recipes.sweeps import Point


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-ood")
    parser.add_argument("--depths", default="0.1,0.2,0.3,0.5", help="of the layers, as shares of the depth (default %(default)s)")
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """The layers that the depths mean for each model."""
    points = []
    for model, config in sweep_parts.read_configs(options).items():
        number = speed_parts.depth_of(config.model)
        layers = sorted({min(number - 1, round(float(depth) * number)) for depth in options.depths.split(",")})
        points += [Point(f"{model} layer {layer} of {number}", replace(config, layers=[layer])) for layer in layers]
    return points


def run(options: argparse.Namespace) -> None:
    table = sweep_parts.run_sweep(make_points(options), options)
    if table is None:
        return
    parts = table["method"].str.extract(r"^(?P<model>\S+) layer (?P<layer>\d+) of (?P<number>\d+)$")
    table["model"], table["layer"] = parts["model"], parts["layer"].astype(int)
    table["depth"] = table["layer"] / parts["number"].astype(int)
    path = Path(options.output) / "figure4"
    sweep_parts.write_figure(table, path, "depth", "model", "one layer", "layer, as a share of the depth", ["model", "layer"])


main = sweep_parts.main_of(parse_arguments, run)

if __name__ == "__main__":
    sys.exit(main())
