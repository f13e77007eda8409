"""Table 1: all layers trained, attention, MLP or both, with meta-training and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from propmeta_edit.evaluation.comparisons import compare_with, comparison_table
from propmeta_edit.evaluation.tables import frame_to_markdown
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.studies import published
from propmeta_edit.studies.engine import Results, StudyOptions
from propmeta_edit.studies.pictures import draw_dots, make_table, save, to_markdown, write_summary
from propmeta_edit.studies.sweeps import SweepOptions, read_configs, run_sweep
from propmeta_edit.studies.variants import Variant

DATASETS = ("valid-id", "valid-ood")
OWN_SETTINGS = "-all-layers"  # of a YAML for this table, where a model has one: all layers move further than one at the same rate


def table1(options: StudyOptions, sweep: SweepOptions, inner_lr: float | None = None, outer_lr: float | None = None) -> int:
    """Table 1: all layers trained, attention, MLP or both, with meta-training and without.

    Args:
        inner_lr: of both loops' edits (default: that of hparams/MetaTrain/<model>-all-layers.yaml or <model>.yaml).
        outer_lr: of meta-training (default: likewise).
    """
    rates: dict[str, Any] = {name: value for name, value in (("inner_lr", inner_lr), ("outer_lr", outer_lr)) if value is not None}
    configs = read_configs(options, sweep, DATASETS, OWN_SETTINGS)
    variants = []
    for model, config in configs.items():
        for modules in MODULE_CHOICES:
            training = replace(config, layers="all", modules=modules, **rates)
            where = {"model": model, "modules": modules}
            variants += [
                Variant(f"{model} {modules}", training=training, coordinates={**where, "is_meta_trained": True}),
                Variant(
                    f"{model} {modules} without", training=training, num_tasks=0, coordinates={**where, "is_meta_trained": False}
                ),
            ]
    return run_sweep("table1", configs, variants, write_table1, options, sweep, DATASETS)


def write_table1(results: Results) -> str:
    """``table1.md`` with the paired gain of meta-training, and the dots of the picture."""
    table, path = make_table(results), results.folder / results.study.name
    write_summary(table, results.folder / f"summary-{results.study.name}")
    table["published %"] = [find_published(row) for row in table.to_dict("records")]
    has_published = table["published %"].notna().any()
    shown = table.assign(**{"published %": table["published %"].map(lambda value: "–" if pd.isna(value) else f"{value:.1f}")})
    columns = ["method", "dataset", "split", *(["published %"] if has_published else [])]
    text = to_markdown(shown, columns, results.notes) + describe_gains(results)
    text += f"\n{published.TABLE_1_PROTOCOL}\n" if has_published else ""
    write_text_atomically(path.with_suffix(".md"), text)
    table["variant"] = table["modules"] if table["model"].nunique() == 1 else table["model"] + "\n" + table["modules"]
    labels = ("with meta-training", "without")
    save(draw_dots(table, "variant", "is_meta_trained", labels, "published %", "all layers trained"), path)
    return text


def find_published(row: dict[str, Any]) -> float | None:
    """The paper's number for a line of the table: only its own model on files of the data it used has one."""
    if not row["is_released"]:
        return None
    return published.table_1_of(row["model"], row["modules"], row["dataset"], row["is_meta_trained"])


def describe_gains(results: Results) -> str:
    """What meta-training adds to each choice of modules, on the same cases; nothing before both of a pair were asked."""
    variants = results.study.variants
    without = {_modules_of(variant): variant.name for variant in variants if not variant.coordinates["is_meta_trained"]}
    pairs = [(variant.name, without[_modules_of(variant)]) for variant in variants if variant.coordinates["is_meta_trained"]]
    entries = [entry for pair in pairs for entry in compare_with([row for row in results.rows if row.method in pair], pair[1])]
    if not entries:
        return ""
    gains = (
        comparison_table(entries).drop(columns="share of in-context accuracy").rename(columns={"difference": "gain, points [95 %]"})
    )
    return f"\nGain of meta-training, paired case by case (bootstrap interval, McNemar's exact test):\n\n{frame_to_markdown(gains)}"


def _modules_of(variant: Variant) -> tuple[str, str]:
    return variant.coordinates["model"], variant.coordinates["modules"]
