"""Settings for one row of Table 2, chosen on the validation splits: every combination gets the same time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import yaml

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.tables import markdown_table, summarise
from propmeta_edit.files import write_text_atomically
from propmeta_edit.options import Files, require_among
from propmeta_edit.studies.choice import CRITERIA, choose
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.methods import find_methods
from propmeta_edit.studies.table2 import load_asked

MINUTES = 2.0  # of each combination, unless told otherwise
DATASETS = Files(("valid-id", "valid-ood"))


def search(
    options: StudyOptions,
    method: str,
    settings: Sequence[str] = (),
    model: str = "smollm2-135m",
    hparams: str | None = None,
    datasets: Files = DATASETS,
    dtype: str = "fast",
    metaft_model: str | None = None,
    by: str = "accuracy",
) -> int:
    """Choose settings for one row of table2 on validation; every combination gets the same time (--minutes-per-row).

    propmeta-edit search ROME layers=[3],[5] v_lr=0.1,0.5 --minutes-per-row 1.5

    Args:
        method: a row of table2.
        settings: NAME=VALUE,VALUE,... in YAML, e.g. layers=[3],[5]; the rest is the row's YAML.
        model: the base.
        hparams: name of the YAML in hparams/<method>/ (default: the model's name).
        datasets: what is asked; not a test split.
        dtype: of the frozen rest: float32, bfloat16, float16 or fast.
        metaft_model: the checkpoint that MetaFT edits (default: <model>-metaft).
        by: accuracy, or net, which is what other subjects do not get of it.
    """
    require_among("by", [by], tuple(CRITERIA))
    [row] = find_methods([method])
    bench = options.make_bench("search", model, hparams, dtype, checkpoints={"metaft": metaft_model} if metaft_model else {})
    variants = [
        replace(row, name=name, settings={**row.settings, **own}, coordinates={"settings": name})
        for name, own in name_combinations(method, read_grid(settings)).items()
    ]
    if options.minutes_per_row is None:
        options = replace(options, minutes_per_row=MINUTES)
    given = {"datasets": list(datasets), "limit": options.limit, "minutes_per_row": options.minutes_per_row, "seed": bench.seed}
    splits = load_asked(datasets, bench.seed)
    return run_study(Study("search", variants, splits, bench, partial(write_ranking, by=by), keep=given), options)


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


def write_ranking(results: Results, by: str = "accuracy") -> str:
    """``search.md``: a line a combination, the best first by the one way to choose; the text to print."""
    names = [data.name for data in results.study.datasets]
    asked = [name for name in (v.name for v in results.study.variants) if any(row.method == name for row in results.rows)]
    choice = choose(asked, names, results.rows, by)
    text = make_table(summarise(results.rows), names, choice.ranking or asked, choice.scores, by)
    text += f"\n- {choice.note}.\n" if choice.note else ""
    write_text_atomically(results.folder / "search.md", text)
    return text


def make_table(
    summary: Sequence[Mapping[str, Any]],
    datasets: Sequence[str],
    order: Sequence[str],
    scores: Mapping[str, float],
    by: str = "accuracy",
) -> str:
    """One line a combination in the order given; the last column decided: the mean over the data sets on the cases all share."""
    lines = []
    for method in order:
        own = {entry["dataset"]: entry for entry in summary if entry["method"] == method}
        found = [own.get(name) for name in datasets]
        cells = ["–" if e is None else _describe(e) for e in found]
        lines.append([method, *cells, f"{100 * scores[method]:.1f}" if method in scores else "–"])
    header = ["settings", *(f"{name}: accuracy % (efficacy %, net)" for name in datasets), f"mean {by}"]
    return markdown_table(header, lines)


def _describe(entry: Mapping[str, Any]) -> str:
    net = "–" if entry["net"] is None else f"{100 * entry['net']:.1f}"
    return f"{100 * entry['accuracy']:.1f} ({100 * entry['efficacy']:.0f}, {net}, n = {entry['n']})"
