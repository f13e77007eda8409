"""What the scripts of Table 1 and Figures 2 to 4 share: options, checks, and the course of a sweep."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import run_table2
import sweep_tables

from propmeta_edit.cli import exit_code_of
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import Row, RowFile, read_rows
from propmeta_edit.evaluation.runner import DataSet, Execute, MethodSpec, run_methods
from propmeta_edit.evaluation.tables import write_settings
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.recipes.comparison import collect_versions
from propmeta_edit.recipes.settings import has_hparams, hparams_file
from propmeta_edit.recipes.splits import TEST, TEST_OF, VALIDATION, Split, hold_out, load_splits, to_test
from propmeta_edit.recipes.sweeps import (
    Point,
    check_points,
    choose_best,
    estimate_asking,
    estimate_sweep,
    make_point_spec,
    measure_runs,
    read_tasks,
    require_rows_fit,
    require_runs_fit,
    runs_left,
    share_of,
)
from propmeta_edit.recipes.worlds import WORLD


@dataclass(frozen=True)
class Sweep:
    """What is a script's own.

    Args:
        name: of its files.
        make_points: the variants.
        annotate: puts what a label says into columns of the table.
        write: writes table and picture from the annotated table, the rows, and notes to put under the table.
        lines: the column each of whose values is a line of the picture; None where there are no lines.
        chosen_in: the column in each of whose values the best variant is chosen; None where nothing is.
    """

    name: str
    make_points: Callable[[argparse.Namespace], list[Point]]
    annotate: Callable[[pd.DataFrame], None]
    write: Callable[[pd.DataFrame, Sequence[Row], Path, Sequence[str]], str]
    lines: str | None = None
    chosen_in: str | None = None

    def labels_by(self, column: str, points: Sequence[Point]) -> dict[str, list[str]]:
        """The labels of variants by the value of a column that ``annotate`` makes."""
        table = pd.DataFrame({"method": [point.label for point in points]})
        self.annotate(table)
        return {value: list(group) for value, group in table.groupby(column, sort=False)["method"]}


@dataclass(frozen=True)
class Asked:
    """The data sets of a sweep: those every variant is asked, and by their names the test splits the best ones are asked too."""

    splits: Sequence[Split]
    reported: dict[str, Split]

    @property
    def datasets(self) -> list[DataSet]:
        return [split.data for split in self.splits]


@dataclass(frozen=True)
class Choices:
    """The best variants' labels by series and data set they were chosen on, and what a reader must know of the choices."""

    best: dict[tuple[str, str], str]
    notes: list[str]


def make_parser(doc: str | None, datasets: str) -> argparse.ArgumentParser:
    """The options that every sweep has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m", help="names of YAMLs in hparams/MetaTrain (default %(default)s)")
    parser.add_argument("--data", help="CRE's training file for all models, or world (default: what each YAML says)")
    parser.add_argument(
        "--datasets",
        default=datasets,
        help="as for run_table2.py (default %(default)s); valid-id and valid-ood by name alone are held out of a training file",
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="the paper's way, which the result then says: choices too are made on the test splits (cre-id, cre-ood)",
    )
    parser.add_argument(
        "--test-datasets",
        help="on what the variants that were best on validation are asked as well, e.g. cre-ood=test_data_ood.jsonl, where "
        "anything is chosen (default: the offline world's test splits for models that are trained on it)",
    )
    parser.add_argument("--num-tasks", type=int, help="of each meta-training (default: the YAML's)")
    parser.add_argument("--limit", type=int, default=100, help="cases a data set (default %(default)s)")
    parser.add_argument("--minutes-per-row", type=float, help="stop asking a variant after so long")
    parser.add_argument("--minutes", type=float, help="start no further variant after so long")
    parser.add_argument("--output", required=True, help="folder of everything; a stopped sweep continues there")
    parser.add_argument("--retry-failed", action="store_true", help="run the cases again that failed in former runs")
    parser.add_argument("--plan", action="store_true", help="say what would run, and start nothing")
    parser.add_argument(
        "--seconds-a-task", type=float, help="for --plan (default: timed on a few tasks of each model that is here)"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="only the I-th of N shares of the variants, to spread them over machines that write into one folder (or one after "
        "another); the same command without it afterwards puts the shares together",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, help="of meta-training and of the cases (default: the YAMLs' own, and 0)")
    run_table2.add_worker_options(parser)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be done with.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("limit", "num_tasks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("minutes_per_row", "minutes", "seconds_a_task"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
    read_part(options)


def read_part(options: argparse.Namespace) -> tuple[int, int]:
    """Which share of how many this run is; all is the only one of one."""
    found = re.fullmatch(r"(\d+)/(\d+)", options.part or "1/1")
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"--part must be I/N with I from 1 to N, e.g. 2/4, got {options.part!r}")
    return number, count


def read_list(text: str, option: str, convert: Callable[[str], Any] = str) -> list[Any]:
    """Comma-separated values, each once.

    Raises:
        ConfigError: none, or one that is not of the kind.
    """
    try:
        values = [convert(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} takes {convert.__name__} values separated by commas, got {text!r}") from error
    if not values:
        raise ConfigError(f"{option} must name at least one value, got {text!r}")
    return list(dict.fromkeys(values))


def read_items(options: argparse.Namespace) -> list[str]:
    """The data sets to ask, as they are written on the command line."""
    items = read_list(options.datasets, "--datasets")
    return list(dict.fromkeys(map(to_test, items))) if options.test else items


def read_configs(options: argparse.Namespace, suffix: str = "") -> dict[str, MetaTrainConfig]:
    """The runs' settings by model, without validation on the way; those of ``<model><suffix>`` where there is such a YAML."""
    configs = {}
    given = {name: value for name in ("data", "seed", "num_tasks") if (value := getattr(options, name)) is not None}
    for name in read_list(options.models, "--models"):
        path = hparams_file("MetaTrain", name + suffix if has_hparams("MetaTrain", name + suffix) else name)
        config = build_config(MetaTrainConfig, read_yaml(path), str(path))
        configs[name] = hold_out(replace(config, device=options.device, **given), read_items(options))
    return configs


def seed_of(options: argparse.Namespace) -> int:
    """Of the choice of cases."""
    return 0 if options.seed is None else options.seed


def run_sweep(sweep: Sweep, options: argparse.Namespace) -> int:
    """Every variant on every data set, then the best ones on the test split; returns how many cases failed."""
    started = time.monotonic()
    check_options(options)
    asked = find_data(sweep, options)
    if not options.plan:  # Figure 4 reads the models' depths while it makes its points
        for config in read_configs(options).values():
            resolve_model_folder(config.model)
    all_points = sweep.make_points(options)
    check_points(all_points)
    if sweep.lines is not None:
        sweep_tables.require_styles(list(sweep.labels_by(sweep.lines, all_points)))
    points = share_of(all_points, *read_part(options))
    require_runs_fit(points, Path(options.output))
    tasks = {name: read_tasks(config)[0] for name, config in runs_left(points, Path(options.output)).items()}
    if options.plan:
        print(plan(sweep, points, asked, tasks, options))
        return 0
    rows = open_rows(options)
    every = [*asked.datasets, *(split.data for split in asked.reported.values())]
    require_rows_fit(points, every, rows, Path(options.output), seed_of(options))
    if options.retry_failed:
        print(f"{rows.forget_failed()} cases that failed run again", file=sys.stderr)
    course = Course(sweep, all_points, asked, rows, options, started, run_table2.find_workers(options))
    return course.run(points)


def find_data(sweep: Sweep, options: argparse.Namespace) -> Asked:
    """Load what is asked, and the test splits for what is chosen on validation.

    Raises:
        ConfigError, DataError: as ``load_splits``; --test-datasets where nothing is chosen on validation, or of another kind.
    """
    configs, items = read_configs(options), read_items(options)
    splits = load_splits(items, configs, seed_of(options))
    chosen_on = [split.data.name for split in splits if split.kind == VALIDATION and split.data.name in TEST_OF]
    if options.test_datasets is None:
        is_offline = sweep.chosen_in and all(config.data == WORLD for config in configs.values())
        wanted = [TEST_OF[item] for item in items if item in TEST_OF] if is_offline else []
    else:
        wanted = read_list(options.test_datasets, "--test-datasets")
        if not sweep.chosen_in or not chosen_on:
            raise ConfigError("--test-datasets is for what is chosen on valid-id or valid-ood; name other data sets in --datasets")
    tests = {split.data.name: split for split in (load_splits(wanted, configs, seed_of(options)) if wanted else [])}
    reported = {name: tests.pop(TEST_OF[name]) for name in chosen_on if TEST_OF[name] in tests}
    if tests:
        raise ConfigError(f"--test-datasets must be those of --datasets ({', '.join(chosen_on)}), got {', '.join(tests)}")
    return Asked(splits, reported)


def open_rows(options: argparse.Namespace) -> RowFile:
    """The rows of this share; those of all shares that are there, if this is the whole sweep."""
    rows = RowFile(rows_file(options))
    gathered = {row.key: row for row in gather_rows(options)}
    if any(row.error is not None and gathered[row.key].error is None for row in rows.rows):
        rows.forget_failed()  # a share has asked some of them again; the others are gathered too
    known = {row.key for row in rows.rows}
    for key, row in gathered.items():
        if key not in known:
            rows.append(row)
    return rows


def gather_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that ``open_rows`` has, with nothing written: each case once, as it failed only where it failed in all shares."""
    own = rows_file(options)
    shares = [] if options.part else sorted(own.parent.glob("rows-part-*.jsonl"))
    rows = [row for path in (own, *shares) for row in read_rows(path)]
    gathered: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.error is not None):
        gathered.setdefault(row.key, row)
    return list(gathered.values())


def rows_file(options: argparse.Namespace) -> Path:
    """Where the rows of this share, or of the whole sweep, are."""
    return Path(options.output) / (f"rows-part-{options.part.replace('/', '-of-')}.jsonl" if options.part else "rows.jsonl")


def choose(sweep: Sweep, points: Sequence[Point], asked: Asked, rows: Sequence[Row]) -> Choices:
    """The best variant of each series on each data set, as far as all of the series were asked there."""
    choices = Choices({}, [])
    series = {} if sweep.chosen_in is None else sweep.labels_by(sweep.chosen_in, points)
    for data in asked.datasets:
        for name, labels in series.items():
            best, note = choose_best(labels, data.name, rows)
            if best is not None:
                choices.best[name, data.name] = best
            if note:
                choices.notes.append(f"{name} on {data.name}: {note}.")
    return choices


def plan(sweep: Sweep, points: Sequence[Point], asked: Asked, tasks: dict[str, int], options: argparse.Namespace) -> str:
    """What is there and what is left, with time and disk; nothing is started, save the timing of a few tasks."""
    folder = Path(options.output)
    left = runs_left(points, folder)
    known = options.seconds_a_task
    if known is None and left:
        print("timing a few tasks of each model and choice of modules; --seconds-a-task is faster", file=sys.stderr)
    seconds = measure_runs(left) if known is None else dict.fromkeys(left, known)
    rows = [row for row in gather_rows(options) if row.error is None or not options.retry_failed]
    wanted = [(point.label, data) for point in points for data in asked.datasets]
    if sweep.chosen_in is not None and not options.part:  # the shares together ask the best
        best = choose(sweep, points, asked, rows).best
        series = sweep.labels_by(sweep.chosen_in, points)
        wanted += [(best.get((name, key), ""), split.data) for key, split in asked.reported.items() for name in series]
    asking = estimate_asking(wanted, rows, options.limit, seed_of(options))
    return f"{estimate_sweep(points, folder, seconds, tasks)}\n{asking}"


@dataclass
class Course:
    """A sweep while it runs: what is asked, what is written after each variant, and when it stops."""

    sweep: Sweep
    points: Sequence[Point]
    asked: Asked
    rows: RowFile
    options: argparse.Namespace
    started: float
    execute: Execute | None

    def run(self, points: Sequence[Point]) -> int:
        """Ask ``points``, then the best of all; returns how many cases failed."""
        failures = 0
        for done, point in enumerate(points):  # one at a time: a variant is asked as soon as it is meta-trained
            if self._is_over([p.label for p in points[done:]]):
                break
            failures += self._ask(point, self.asked.datasets)
        else:
            failures += 0 if self.options.part else self._ask_the_best()
        if self.options.part:
            print(f"part {self.options.part} is in {self.rows.path}; the same command without --part puts the parts together")
        else:
            print(self._write())
        if failures:
            print(
                f"{failures} cases failed and count as wrong; their tracebacks are in {self.rows.path}, and "
                "--retry-failed runs them again",
                file=sys.stderr,
            )
        return failures

    def _is_over(self, left: Sequence[str]) -> bool:
        minutes = self.options.minutes
        if minutes is None or time.monotonic() - self.started < 60 * minutes:
            return False
        print(f"the {minutes:g} minutes are over; left, and done by the same command: {', '.join(left)}", file=sys.stderr)
        return True

    def _ask(self, point: Point, datasets: Sequence[DataSet]) -> int:
        spec, before = make_point_spec(point, Path(self.options.output)), len(self.rows.rows)
        failures = run_methods(
            [spec],
            datasets,
            self.rows,
            limit=self.options.limit,
            budget=self._budget(spec, datasets),
            seed=seed_of(self.options),
            versions=collect_versions([]),
            execute=self.execute,
        )
        if not self.options.part:
            write_settings([spec], self.options.output)
            if len(self.rows.rows) > before:  # a sweep that is stopped has shown what it has
                self._write()
        return failures

    def _budget(self, spec: MethodSpec, datasets: Sequence[DataSet]) -> float | None:
        """Seconds for these data sets, to which those that others took are added, since ``run_methods`` counts all of a method."""
        if self.options.minutes_per_row is None:
            return None
        names = {data.name for data in datasets}
        others = [row.seconds or 0.0 for row in self.rows.rows if row.method == spec.name and row.dataset not in names]
        return 60 * self.options.minutes_per_row + sum(others)

    def _ask_the_best(self) -> int:
        failures = 0
        best = [(label, name) for (_, name), label in self._choose().best.items() if name in self.asked.reported]
        for done, (label, name) in enumerate(best):
            if self._is_over([f"{left} on the test split" for left, _ in best[done:]]):
                break
            [point] = [point for point in self.points if point.label == label]
            failures += self._ask(point, [self.asked.reported[name].data])
        return failures

    def _choose(self) -> Choices:
        return choose(self.sweep, self.points, self.asked, self.rows.rows)

    def _write(self) -> str:
        """The summary, the table and the picture of what there is; the table's text."""
        table = sweep_tables.make_table(self.rows.rows, [p.label for p in self.points], self.asked.splits)
        if table is None:
            return "nothing was asked yet"
        self.sweep.annotate(table)
        choices = self._choose()
        best = [(label, name) for (_, name), label in choices.best.items()]
        table = sweep_tables.mark_best(table, self.rows.rows, best, self.asked.reported, self.sweep.annotate)
        table["split"] = [self._describe(row) for row in table.to_dict("records")]
        folder = Path(self.options.output)
        sweep_tables.write_summary(table, folder / f"summary-{self.sweep.name}")
        return self.sweep.write(table, self.rows.rows, folder / self.sweep.name, choices.notes)

    def _describe(self, row: dict[str, Any]) -> str:
        if row["reported"]:
            return f"{TEST} (chosen on {VALIDATION})"
        is_papers_way = row["kind"] == TEST and self.sweep.chosen_in is not None
        return f"{TEST} (chosen on test, as in the paper)" if is_papers_way else row["kind"]


def main_of(parse: Callable[[list[str] | None], argparse.Namespace], sweep: Sweep) -> Callable[..., int]:
    """The ``main`` of a sweep: exit code 0, 1 if cases failed, 2 for what the user can mend."""

    def main(argv: list[str] | None = None) -> int:
        options = parse(argv)
        return exit_code_of(lambda: run_sweep(sweep, options))

    return main
