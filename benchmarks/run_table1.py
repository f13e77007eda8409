"""Table 1: all layers trained, attention, MLP or both, with meta-training and without.

python benchmarks/run_table1.py --output results/table1
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import published
import sweep_parts

from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.recipes.sweeps import Point

PAPERS_MODEL = "llama3-8b"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-id,valid-ood")
    parser.add_argument("--inner-lr", type=float, help="all layers move further than one at the same rate (default: the YAML's)")
    parser.add_argument("--outer-lr", type=float)
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """With and without meta-training for each choice of modules, model by model."""
    rates = {name: value for name in ("inner_lr", "outer_lr") if (value := getattr(options, name)) is not None}
    points = []
    for model, config in sweep_parts.read_configs(options).items():
        for modules in MODULE_CHOICES:
            own = replace(config, layers="all", modules=modules, **rates)
            points += [Point(f"{model} {modules}", own), Point(f"{model} {modules} without", own, is_meta_trained=False)]
    return points


def run(options: argparse.Namespace) -> None:
    table = sweep_parts.run_sweep(make_points(options), options)
    if table is None:
        return
    text = sweep_parts.to_markdown(table, ["method", "dataset", "split"])
    if PAPERS_MODEL in options.models.split(","):
        text += "\nPublished for Llama3-8B-Instruct on CRE (ID, OOD, and without meta-learning ID, OOD):\n\n"
        text += "".join(f"- {modules}: {', '.join(map(str, numbers))}\n" for modules, numbers in published.TABLE_1.items())
    write_text_atomically(Path(options.output) / "table1.md", text)
    print(text)


main = sweep_parts.main_of(parse_arguments, run)

if __name__ == "__main__":
    sys.exit(main())
