"""What the scripts of Table 1 and Figures 2 to 4 share: options, running the variants, tables and pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from propmeta_edit.cli import run_or_exit
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import run_methods
from propmeta_edit.evaluation.tables import markdown_table, summarise
from propmeta_edit.files import save_figure, write_text_atomically
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.recipes.comparison import collect_versions, load_datasets
from propmeta_edit.recipes.meta_training import load_tasks, resolve
from propmeta_edit.recipes.settings import hparams_file
from propmeta_edit.recipes.sweeps import Point, estimate_sweep, make_point_spec, name_of_run

STYLES = [("-", "o"), ("--", "s"), (":", "D"), ("-.", "^"), ((0, (1, 3)), "v"), ((0, (5, 1)), "x")]  # told apart in grey


def make_parser(doc: str | None, datasets: str) -> argparse.ArgumentParser:
    """The options that every sweep has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m", help="names of YAMLs in hparams/MetaTrain (default %(default)s)")
    parser.add_argument("--datasets", default=datasets, help="as for run_table2.py (default %(default)s)")
    parser.add_argument("--test", action="store_true", help="the paper's way, which the result then says: the test splits")
    parser.add_argument("--num-tasks", type=int, help="of each meta-training (default: the YAML's)")
    parser.add_argument("--limit", type=int, default=100, help="cases a data set (default %(default)s)")
    parser.add_argument("--minutes-per-row", type=float, help="stop asking a variant after so long")
    parser.add_argument("--output", required=True, help="folder of everything; a stopped sweep continues there")
    parser.add_argument("--plan", action="store_true", help="say what would run, and start nothing")
    parser.add_argument("--seconds-a-task", type=float, default=1.0, help="for --plan (default %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_configs(options: argparse.Namespace) -> dict[str, MetaTrainConfig]:
    """The runs' settings by model, without validation on the way."""
    configs = {}
    for name in options.models.split(","):
        path = hparams_file("MetaTrain", name.strip())
        config = build_config(MetaTrainConfig, read_yaml(path), str(path))
        config = replace(config, device=options.device, seed=options.seed, validate_every=None)
        configs[name.strip()] = replace(config, num_tasks=options.num_tasks) if options.num_tasks else config
    return configs


def run_sweep(points: Sequence[Point], options: argparse.Namespace) -> pd.DataFrame | None:
    """Every variant on every data set; a line each with its interval. None after --plan."""
    folder = Path(options.output)
    if options.plan:
        tasks = {name_of_run(resolve(p.config)): len(load_tasks(p.config)[0]) for p in points if p.is_meta_trained}
        print(estimate_sweep(points, folder, options.seconds_a_task, tasks))
        return None
    names = options.datasets.replace("valid-", "cre-") if options.test else options.datasets
    datasets = [data for item in names.split(",") for data in load_datasets(item.strip(), options.seed)]
    rows = RowFile(folder / "rows.jsonl")
    budget = None if options.minutes_per_row is None else 60 * options.minutes_per_row
    failures = 0
    for point in points:  # one at a time: a variant is asked as soon as it is meta-trained
        failures += run_methods(
            [make_point_spec(point, folder)],
            datasets,
            rows,
            limit=options.limit,
            budget=budget,
            seed=options.seed,
            versions=collect_versions([]),
        )
    order = {point.label: number for number, point in enumerate(points)}
    if failures:
        print(f"{failures} cases failed and count as wrong; their tracebacks are in {rows.path}", file=sys.stderr)
    asked = {data.name for data in datasets}
    known = [row for row in rows.rows if row.method in order and row.dataset in asked]
    summary = sorted(summarise(known), key=lambda entry: order[entry["method"]])
    table = pd.DataFrame(summary)
    table["low"] = [entry["accuracy_ci95"][0] for entry in summary]
    table["high"] = [entry["accuracy_ci95"][1] for entry in summary]
    table["split"] = "test (chosen on test, as in the paper)" if options.test else "validation"
    write_text_atomically(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text_atomically(folder / "summary.csv", table.drop(columns=["accuracy_ci95", "efficacy_ci95"]).to_csv(index=False))
    return table


def write_figure(table: pd.DataFrame, path: Path, x: str, series: str, title: str, xlabel: str, columns: Sequence[str]) -> None:
    """``draw_lines``, and the same numbers as Markdown beside the picture."""
    draw_lines(table, x, series, path, title, xlabel)
    write_text_atomically(path.with_suffix(".md"), to_markdown(table, [*columns, "dataset", "split"]))


def draw_lines(table: pd.DataFrame, x: str, series: str, path: Path, title: str, xlabel: str) -> None:
    """Accuracy against ``x``, a line a value of ``series``, a panel a data set, with 95 % intervals: PNG and SVG."""
    datasets = list(dict.fromkeys(table["dataset"]))
    figure = Figure(figsize=(3.4 * len(datasets) + 0.6, 3.2), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        groups = table[table["dataset"] == dataset].groupby(series, sort=False)
        for (line, marker), (name, rows) in zip(STYLES * 9, groups, strict=False):
            low, high = rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]
            axis.errorbar(
                rows[x], 100 * rows["accuracy"], yerr=[100 * low.clip(0), 100 * high.clip(0)], fmt=marker, linestyle=line,
                color="black", markerfacecolor="white", markersize=4, capsize=2, linewidth=1, label=name,
            )  # fmt: skip
        axis.set(xlabel=xlabel, title=dataset, ylim=(0, 100))
        axis.title.set_fontsize(9)
    figure.axes[0].set_ylabel("accuracy after an edit, %")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}: {table['split'].iloc[0]}, n = {table['n'].min()} to {table['n'].max()}", fontsize=9)
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_suffix(suffix))


def to_markdown(table: pd.DataFrame, columns: Sequence[str]) -> str:
    """The columns, and accuracy with its interval."""
    rows = []
    for row in table.to_dict("records"):
        shown = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        rows.append([*(str(row[name]) for name in columns), str(row["n"]), shown, f"{100 * row['efficacy']:.1f}"])
    return markdown_table([*columns, "n", "accuracy % [95 %]", "efficacy %"], rows)


def main_of(
    parse: Callable[[list[str] | None], argparse.Namespace], run: Callable[[argparse.Namespace], Any]
) -> Callable[..., int]:
    """The ``main`` of a sweep: exit code 0, or 2 for what the user can mend."""

    def main(argv: list[str] | None = None) -> int:
        options = parse(argv)
        return run_or_exit(lambda: run(options))

    return main
