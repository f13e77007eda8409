"""Figure 3: accuracy against meta-training tasks, several models, from the checkpoints of one run each.

python benchmarks/run_figure3.py --models smollm2-135m,gemma3-270m --every 160 --output results/figure3
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
from propmeta_edit.recipes.sweeps import Point


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-id,valid-ood")
    parser.add_argument("--every", type=int, required=True, help="tasks between two points; must divide the number of tasks")
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """The base, then each checkpoint, model by model."""
    points = []
    for model, config in sweep_parts.read_configs(options).items():
        if options.every < 1 or config.num_tasks is None or config.num_tasks % options.every:
            raise ConfigError(f"--every must divide --num-tasks, got {options.every} and {config.num_tasks}")
        if options.every % config.tasks_per_step:
            raise ConfigError(f"--every must be a multiple of the {config.tasks_per_step} tasks of a step, got {options.every}")
        own = replace(config, checkpoint_every=options.every)
        points.append(Point(f"{model} after 0", own, is_meta_trained=False))
        points += [Point(f"{model} after {n}", own, num_tasks=n) for n in range(options.every, config.num_tasks + 1, options.every)]
    return points


def annotate(table: pd.DataFrame) -> None:
    parts = table["method"].str.extract(r"^(?P<model>\S+) after (?P<tasks>\d+)$")
    table["tasks"], table["model"] = parts["tasks"].astype(int), parts["model"]


def write(table: pd.DataFrame, rows: Sequence[Row], path: Path, notes: Sequence[str] = ()) -> str:
    return sweep_tables.write_figure(table, path, "tasks", "model", "meta-training", "tasks", ["model", "tasks"], notes)


main = sweep_parts.main_of(parse_arguments, sweep_parts.Sweep("figure3", make_points, annotate, write, lines="model"))

if __name__ == "__main__":
    sys.exit(main())
