"""Table 1: all layers trained, attention, MLP or both, with meta-training and without.

python benchmarks/run_table1.py --output results/table1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import published
import sweep_parts
import sweep_tables

from propmeta_edit.evaluation.comparisons import compare_with, comparison_table
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.tables import frame_to_markdown
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.recipes.sweeps import Point

OWN_SETTINGS = "-all-layers"  # of a YAML for this table, where a model has one: all layers move further than one at the same rate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sweep_parts.make_parser(__doc__, "valid-id,valid-ood")
    parser.add_argument(
        "--inner-lr", type=float, help=f"(default: that of hparams/MetaTrain/<model>{OWN_SETTINGS}.yaml or <model>.yaml)"
    )
    parser.add_argument("--outer-lr", type=float, help="(default: likewise)")
    return parser.parse_args(argv)


def make_points(options: argparse.Namespace) -> list[Point]:
    """With and without meta-training for each choice of modules, model by model."""
    rates = {name: value for name in ("inner_lr", "outer_lr") if (value := getattr(options, name)) is not None}
    points = []
    for model, config in sweep_parts.read_configs(options, OWN_SETTINGS).items():
        for modules in MODULE_CHOICES:
            own = replace(config, layers="all", modules=modules, **rates)
            points += [Point(f"{model} {modules}", own), Point(f"{model} {modules} without", own, is_meta_trained=False)]
    return points


def annotate(table: pd.DataFrame) -> None:
    parts = table["method"].str.extract(r"^(?P<model>\S+) (?P<modules>\S+?)(?P<without> without)?$")
    table["model"], table["modules"], table["is_meta_trained"] = parts["model"], parts["modules"], parts["without"].isna()


def write(table: pd.DataFrame, rows: Sequence[Row], path: Path, notes: Sequence[str] = ()) -> str:
    """``table1.md`` with the paired gain of meta-training, and the dots of the picture."""
    table["published %"] = [find_published(row) for row in table.to_dict("records")]
    has_published = table["published %"].notna().any()
    shown = table.assign(**{"published %": table["published %"].map(lambda value: "–" if pd.isna(value) else f"{value:.1f}")})
    columns = ["method", "dataset", "split", *(["published %"] if has_published else [])]
    text = sweep_tables.to_markdown(shown, columns, notes) + describe_gains(table, rows)
    text += f"\n{published.TABLE_1_PROTOCOL}\n" if has_published else ""
    write_text_atomically(path.with_suffix(".md"), text)
    table["variant"] = table["modules"] if table["model"].nunique() == 1 else table["model"] + "\n" + table["modules"]
    labels = ("with meta-training", "without")
    figure = sweep_tables.draw_dots(table, "variant", "is_meta_trained", labels, "published %", "all layers trained")
    sweep_tables.save(figure, path)
    return text


def find_published(row: dict[str, Any]) -> float | None:
    """The paper's number for a line of the table: only its own model on files of the data it used has one."""
    if not row["is_released"]:
        return None
    return published.table_1_of(row["model"], row["modules"], row["dataset"], row["is_meta_trained"])


def describe_gains(table: pd.DataFrame, rows: Sequence[Row]) -> str:
    """What meta-training adds to each choice of modules, on the same cases; nothing before both of a pair were asked."""
    entries = []
    for name in table.loc[table["is_meta_trained"], "method"].unique():
        pair = (name, f"{name} without")
        asked = [row for row in rows if row.method in pair and row.dataset in set(table["dataset"])]
        entries += compare_with(asked, f"{name} without")
    if not entries:
        return ""
    gains = (
        comparison_table(entries).drop(columns="share of in-context accuracy").rename(columns={"difference": "gain, points [95 %]"})
    )
    return f"\nGain of meta-training, paired case by case (bootstrap interval, McNemar's exact test):\n\n{frame_to_markdown(gains)}"


main = sweep_parts.main_of(parse_arguments, sweep_parts.Sweep("table1", make_points, annotate, write))

if __name__ == "__main__":
    sys.exit(main())
