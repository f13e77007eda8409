"""What an analysis found, as pictures with 95 % intervals: PNG and SVG, told apart without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from propmeta_edit.analysis.gains import HALVES, THIRDS, CaseResult, compare_by_group
from propmeta_edit.evaluation.statistics import mean_interval
from propmeta_edit.files import save_figure
from propmeta_edit.studies.analysis_tables import (
    MEASURES,
    TOKENS,
    Studies,
    group_functions,
    groups_of,
    lens_rise,
    measure_interval,
    restored_share,
)

LINES = [
    ("black", "-", "o"),
    ("0.5", "--", "s"),
    ("black", ":", "D"),
    ("0.5", "-.", "^"),
    ("0.7", "-", "v"),
    ("0.3", (0, (5, 1)), "x"),
]
SMALL = 8


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG beside each other."""
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_name(path.name + suffix))


def draw_lens(studies: Studies, path: Path) -> None:
    """How much likelier the edit makes the new object and the answer under the lens, by layer, at three positions."""
    groups = ("subject", "phrase", "last")
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots(2, len(groups), sharex=True, sharey="row")
    for row, token in zip(axes, (0, 1), strict=True):
        for axis, group in zip(row, groups, strict=True):
            for (shade, line, marker), (arm, own) in zip(LINES, studies.items(), strict=False):
                mean, low, high = mean_interval(lens_rise(own, group)[:, :, token])
                layers = np.arange(len(mean))
                axis.plot(
                    layers, mean, color=shade, linestyle=line, marker=marker, markevery=4, markersize=3.5, label=arm, linewidth=1.2
                )
                axis.fill_between(layers, low, high, color=shade, alpha=0.15, linewidth=0)
            axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            axis.set_title(
                f"{TOKENS[token]}, at the {'last token' if group == 'last' else group + chr(39) + 's end'}", fontsize=SMALL
            )
            axis.tick_params(labelsize=SMALL)
        row[0].set_ylabel("rise of log-probability, nats", fontsize=SMALL)
    for axis in axes[-1]:
        axis.set_xlabel("blocks passed", fontsize=SMALL)
    axes[0][0].legend(fontsize=SMALL - 1)
    save(figure, path)


def draw_patching(states: Mapping[str, Studies], path: Path) -> None:
    """Which positions' states bring the answer along, by the block after which they are put into the unedited run."""
    arms = list(next(iter(states.values())))
    figure = Figure(figsize=(7, 2.5 * len(states) + 0.5), layout="constrained")
    axes = figure.subplots(len(states), len(arms), sharex=True, sharey=True, squeeze=False)
    for row, (dataset, studies) in zip(axes, states.items(), strict=True):
        groups = groups_of(studies, "question")
        for axis, arm in zip(row, arms, strict=True):
            layers = studies[arm][0]["layers"]
            for (shade, line, marker), group in zip(LINES, groups, strict=False):
                value, low, high = (100 * found for found in restored_share(studies[arm], "question", group))
                spread = [(value - low).clip(0), (high - value).clip(0)]
                axis.errorbar(
                    layers, value, yerr=spread, color=shade, linestyle=line, marker=marker, markersize=3.5, linewidth=1.1,
                    elinewidth=0.7, capsize=1.5, label=group,
                )  # fmt: skip
            axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            axis.set_title(f"{arm}, {dataset}, n = {len(studies[arm])}", fontsize=SMALL)
            axis.tick_params(labelsize=SMALL)
        row[0].set_ylabel("of the edit's effect, %", fontsize=SMALL)
    for axis in axes[-1]:
        axis.set_xlabel("states put in after block", fontsize=SMALL)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=SMALL)
    save(figure, path)


def draw_weights(weights: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Each measure of the change at each stage."""
    labels = [label.removeprefix("after ").removesuffix(" tasks") for label in weights]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    names = [name for name in MEASURES if "first direction" not in name and "of its kind" not in name]
    for axis, name in zip(figure.subplots(2, 3, sharex=True).flat, names, strict=True):
        mean, low, high = np.array([measure_interval(stage, name) for stage in weights.values()]).T
        places = np.arange(len(labels))
        axis.errorbar(
            places, mean, yerr=[mean - low, high - mean], color="black", marker="o", markersize=4, linestyle="none", capsize=2
        )
        axis.plot(places[1:], mean[1:], color="0.6", linewidth=0.8, zorder=0)  # FT's own layer is no stage on the way
        axis.set_title(name, fontsize=SMALL)
        axis.set_xticks(places, labels, rotation=60, ha="right")
        axis.tick_params(labelsize=SMALL)
        axis.margins(y=0.15)
    figure.supxlabel("edits from: FT's own layer; the base; after so many tasks; the meta-trained model", fontsize=SMALL)
    save(figure, path)


def draw_gains(gains: Mapping[str, Sequence[CaseResult]], path: Path) -> None:
    """MetaFT minus FT in each group of cases, a panel a data set."""
    columns = [_group_entries(results) for results in gains.values()]
    heights = [len(column) + 4 for column in columns]
    figure = Figure(figsize=(6, 0.16 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(columns), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for axis, (dataset, results), entries in zip(axes[:, 0], gains.items(), columns, strict=True):
        places = np.arange(len(entries))[::-1]
        middle, low, high = (np.array([100 * entry[name] for entry in entries]) for name in ("difference", "low", "high"))
        spread = [(middle - low).clip(0), (high - middle).clip(0)]
        axis.errorbar(middle, places, xerr=spread, fmt="o", color="black", markersize=3.5, capsize=1.5, linewidth=0.8)
        axis.axvline(0, color="0.6", linewidth=0.7, zorder=0)
        axis.set_yticks(places, [f"{entry['group']} ({entry['n']})" for entry in entries])
        axis.tick_params(labelsize=SMALL - 1.5)
        axis.set_title(f"{dataset}, n = {len(results)}", fontsize=SMALL)
        axis.margins(y=0.02)
    axes[-1, 0].set_xlabel("MetaFT minus FT, points", fontsize=SMALL)
    save(figure, path)


def _group_entries(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """All groupings below each other, the whole first."""
    found = [{**entry, "group": "all cases"} for entry in compare_by_group(results, lambda result: "")]
    for name, group_of in group_functions(results).items():
        entries = compare_by_group(results, group_of)
        if name.startswith("prior"):
            entries.sort(key=lambda entry: (*THIRDS, *HALVES).index(entry["group"]))
            entries = [{**entry, "group": f"prior {entry['group']}"} for entry in entries]
        found += entries
    return found
