"""The engine of every study: its variants are made ready, asked, chosen among and written, and all of it can be stopped.

A study is a declaration (``Study``). What is finished stays in the folder of its output: checkpoints of the meta-training runs it
needs, one row a case in ``rows.jsonl``, and its tables and pictures. The same command goes on from there.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import propmeta_edit
from propmeta_edit.easyedit.algorithms import BASELINES
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import Row, RowFile, protocol_of, read_rows
from propmeta_edit.evaluation.runner import DataSet, Execute, MethodSpec, count_left, require_fitting, run_methods
from propmeta_edit.evaluation.tables import read_settings, write_settings
from propmeta_edit.evaluation.workers import RayWorkers
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.generation import MAX_NEW_TOKENS
from propmeta_edit.options import require_at_least, require_positive
from propmeta_edit.recipes.meta_training import resolve
from propmeta_edit.recipes.splits import Split
from propmeta_edit.store import require_made_from
from propmeta_edit.studies.choice import Choice, choose
from propmeta_edit.studies.cost import Asked, describe_plan
from propmeta_edit.studies.readiness import describe_missing, require_ready
from propmeta_edit.studies.runs import (
    check_trainable,
    folder_of_run,
    name_of_run,
    read_tasks,
    require_runs_fit,
    runs_left,
    runs_of,
    share_of,
)
from propmeta_edit.studies.texts import check_texts, describe_too_long
from propmeta_edit.studies.variants import Bench, Variant, prepare


@dataclass(frozen=True)
class StudyOptions:
    """What every study can be told.

    Args:
        output: folder of everything (default: results/ and the study's name); a stopped study continues there.
        limit: cases of each data set (default: the study's own); a larger one continues a smaller one.
        minutes_per_row: stop asking a variant after so long, its rows on disk counted; slower ones get fewer cases.
        minutes: start no further variant after so long.
        retry_failed: run the cases again that failed in former runs.
        plan: say what would run, with time, memory and disk, and start nothing.
        seconds_a_task: of meta-training, for --plan (default: timed on a few tasks of each model that is here).
        part: I/N for only the I-th of N shares of the variants, to spread them over machines that write into one folder (or one
            after another); the same command without it afterwards puts the shares together.
        device: auto, cpu, mps, cuda or cuda:N.
        seed: of the choice of cases, and of meta-training (default: 0, and the YAMLs' own).
        ray: spread the cases over Ray workers, of the cluster at this address (auto: the one that this machine belongs to) or,
            without one, on this machine.
        workers: with --ray: processes, each with its own model.
        gpus_per_worker: with --ray; a fraction shares one.
        cpus_per_worker: with --ray.
        max_new_tokens: of an answer, greedily; the paper's ten. Another number is another protocol, whose rows stand apart.
        hparams_dir: a folder of YAMLs of your own, FOLDER/<method>/<name>.yaml as in hparams/, which is looked into first.
    """

    output: str | None = None
    limit: int | None = None
    minutes_per_row: float | None = None
    minutes: float | None = None
    retry_failed: bool = False
    plan: bool = False
    seconds_a_task: float | None = None
    part: str | None = None
    device: str = "auto"
    seed: int | None = None
    ray: bool | str = False
    workers: int = 2
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    max_new_tokens: int = MAX_NEW_TOKENS
    hparams_dir: str | None = None

    def __post_init__(self) -> None:
        require_at_least(1, limit=self.limit, max_new_tokens=self.max_new_tokens)
        require_positive(minutes_per_row=self.minutes_per_row, minutes=self.minutes, seconds_a_task=self.seconds_a_task)
        _ = self.share

    @property
    def share(self) -> tuple[int, int]:
        """Which share of how many this run is; all is the only one of one."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(f"--part must be I/N with I from 1 to N, e.g. 2/4, got {self.part!r}")
        return number, count

    @property
    def resolved_device(self) -> str:
        """The device they mean on this machine; a worker of Ray's sees no GPU but its own."""
        device = resolve_device(self.device)
        return "cuda:0" if self.ray is not False and device.startswith("cuda") else device

    @property
    def case_seed(self) -> int:
        """Of the choice of cases."""
        return 0 if self.seed is None else self.seed

    def make_bench(self, study: str, model: str = "", hparams: str | None = None, dtype: str = "float32", **more: Any) -> Bench:
        """What all variants of the study of this name share; ``more`` are other fields of ``Bench``.

        Args:
            model: ``""`` where each variant has a ``training`` of its own.
            hparams: None for the model's name.
            dtype: as options have it, ``fast`` too.
        """
        return Bench(
            model=model,
            hparams=hparams or Path(model).name,
            device=self.resolved_device,
            dtype=resolve_dtype(dtype, self.resolved_device),
            seed=self.case_seed,
            max_new_tokens=self.max_new_tokens,
            hparams_dir=self.hparams_dir,
            folder=Path(self.output or f"results/{study}"),
            **more,
        )


@dataclass(frozen=True)
class Results:
    """What a study knows so far.

    Attributes:
        rows: of its variants, in their order.
        all_rows: those of others in the folder too.
        choices: by series and data set what was chosen there.
        folder: where its tables go.
    """

    study: Study
    rows: Sequence[Row]
    all_rows: Sequence[Row]
    choices: Mapping[tuple[str, str], Choice]
    folder: Path

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the choices."""
        return [f"{series} on {data}: {choice.note}." for (series, data), choice in self.choices.items() if choice.note]

    @property
    def best(self) -> list[tuple[str, str]]:
        """(variant, data set it was chosen on)."""
        return [(choice.best, data) for (_, data), choice in self.choices.items() if choice.best is not None]


@dataclass(frozen=True)
class Study:
    """A study as it is declared.

    Args:
        name: of its files.
        variants: in the order of its tables.
        splits: what every variant is asked.
        write: writes table and picture of what there is, and returns the text to print.
        series: the coordinate in each of whose values the best variant is chosen, on each data set by itself; None where nothing
            is chosen.
        reported: by the name of a validation split, the test split on which the best variant is asked too.
        limits: cases of single variants, in place of ``StudyOptions.limit``.
        check: raises what would make the rows useless, before anything is spent on them.
        keep: what ``settings.json`` says of every variant besides its own settings.
    """

    name: str
    variants: Sequence[Variant]
    splits: Sequence[Split]
    bench: Bench
    write: Callable[[Results], str]
    series: str | None = None
    reported: Mapping[str, Split] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    check: Callable[[Sequence[Row]], None] = lambda rows: None
    keep: Mapping[str, Any] = field(default_factory=dict)

    @property
    def datasets(self) -> list[DataSet]:
        """What every variant is asked."""
        return [split.data for split in self.splits]

    def choose(self, rows: Sequence[Row]) -> dict[tuple[str, str], Choice]:
        """The choices that these rows allow, by series and data set."""
        groups: dict[str, list[str]] = {}
        if self.series is not None:
            for variant in self.variants:
                groups.setdefault(variant.coordinates[self.series], []).append(variant.name)
        return {(name, data.name): choose(names, [data.name], rows) for data in self.datasets for name, names in groups.items()}


def run_study(study: Study, options: StudyOptions) -> int:
    """Every variant on every data set, then the best ones on the test splits; returns how many cases failed.

    Raises:
        ConfigError, DataError, OriginError, ModelError: what cannot run, before any time is spent on it.
    """
    variants = _share_of(study, options)
    if options.plan:
        _check(study, variants, options)
        missing = dict.fromkeys(message for variant in variants if (message := describe_missing(variant, study.bench)))
        print("\n".join([_plan(study, variants, options), *(f"cannot run yet: {message}" for message in missing)]))
        return len(missing)
    versions, execute = collect_versions(variants), find_workers(options)  # before any model is made for them
    _check(study, variants, options)
    rows, failures = _open_rows(study, options), 0
    _require_rows_fit(study, variants, rows)
    if options.retry_failed:
        print(f"{rows.forget_failed()} cases that failed run again", file=sys.stderr)
    ready = _prepare_those_at_hand(study, variants, rows, options)
    written = len(rows.rows)
    for variant, datasets in _course(study, variants, rows, options):
        if not options.part and len(rows.rows) > written:  # a study that is stopped has shown what it has
            _write(study, rows.rows)
            written = len(rows.rows)
        spec = ready.get(variant.name) or prepare(variant, study.bench)
        _keep_settings(study, spec, options)
        failures += run_methods(
            [spec],
            datasets,
            rows,
            limit=options.limit,
            limits=study.limits,
            budget=None if options.minutes_per_row is None else 60 * options.minutes_per_row,
            seed=options.case_seed,
            versions=versions,
            execute=execute,
        )
    if options.part:
        print(f"part {options.part} is in {rows.path}; the same command without --part puts the parts together")
    else:
        print(_write(study, rows.rows))
    if failures:
        print(
            f"{failures} cases failed and count as wrong; their tracebacks are in {rows.path}, and --retry-failed runs them again",
            file=sys.stderr,
        )
    return failures


def _share_of(study: Study, options: StudyOptions) -> list[Variant]:
    """The variants of this share; those of one meta-training run stay together."""
    of_run = {
        variant.name: variant.name if variant.run is None else name_of_run(resolve(variant.run)) for variant in study.variants
    }
    own = share_of(list(of_run.values()), *options.share)
    return [variant for variant in study.variants if of_run[variant.name] in own]


def _check(study: Study, variants: Sequence[Variant], options: StudyOptions) -> None:
    """Refuse what cannot run, with nothing trained; bases are made if they have to be, unless this is for a plan."""
    if not options.plan:
        for model in dict.fromkeys(study.bench.model_of(variant) for variant in study.variants if not variant.checkpoint):
            resolve_model_folder(model)
    check_trainable(variant.training for variant in study.variants if variant.training is not None)
    runs = runs_of(variant.run for variant in variants)
    require_runs_fit(runs, study.bench.folder)
    for config in runs_left(runs, study.bench.folder).values():
        read_tasks(config)
    if not options.plan:  # which tells of all that is missing at once
        for variant in variants:
            require_ready(variant, study.bench)
    check_texts(variants, study.datasets, study.bench, options.limit, study.limits)


def _plan(study: Study, variants: Sequence[Variant], options: StudyOptions) -> str:
    rows = [row for row in _gather_rows(study, options) if row.error is None or not options.retry_failed]
    asked = [Asked(variant.name, variant, data) for variant in variants for data in study.datasets]
    if not options.part:  # the shares together ask the best
        by_name = {variant.name: variant for variant in study.variants}
        of_series = {variant.coordinates.get(study.series or ""): variant for variant in study.variants}
        for (series, name), choice in study.choose(rows).items():
            if name in study.reported:
                best = by_name.get(choice.best or "")
                label = f"best of {series}" if best is None else best.name
                asked.append(Asked(label, best or of_series[series], study.reported[name].data, is_to_choose=best is None))
    plan = describe_plan(
        asked,
        study.bench,
        rows,
        limit=options.limit,
        limits=study.limits,
        minutes_per_row=options.minutes_per_row,
        seconds_a_task=options.seconds_a_task,
    )
    models = dict.fromkeys(study.bench.model_of(variant) for variant in variants)  # as a rule with one tokenizer
    too_long = dict.fromkeys(line for m in models for line in describe_too_long(m, study.datasets, study.bench, options.limit))
    return "\n".join([plan, *too_long])


def _prepare_those_at_hand(
    study: Study, variants: Sequence[Variant], rows: RowFile, options: StudyOptions
) -> dict[str, MethodSpec]:
    """The variants that need no meta-training here, all of them before any is asked, so that what cannot run is refused at once."""
    ready = {variant.name: prepare(variant, study.bench) for variant in variants if variant.run is None}
    require_fitting(list(ready.values()), study.datasets, rows, options.case_seed)
    study.check([*rows.rows, *(spec.make_row(data, "", options.case_seed) for spec in ready.values() for data in study.datasets)])
    for name, spec in ready.items():
        if count_left(spec, study.datasets, rows, study.limits.get(name, options.limit), options.case_seed):
            spec.check()
    return ready


def _keep_settings(study: Study, spec: MethodSpec, options: StudyOptions) -> None:
    if not options.part:
        known = {**spec.settings, "model_sha256": spec.model_sha256, **study.keep}
        write_settings([replace(spec, settings=known)], study.bench.folder)


def _course(
    study: Study, variants: Sequence[Variant], rows: RowFile, options: StudyOptions
) -> Iterator[tuple[Variant, list[DataSet]]]:
    """What to ask next: one variant after another, each as soon as it is meta-trained, then the best ones on the test splits."""
    started = time.monotonic()
    first = [(variant, study.datasets) for variant in variants]
    yield from _until_time_is_up(first, options, started)
    if options.part or len(rows.rows) == 0:
        return
    by_name = {variant.name: variant for variant in study.variants}
    best = [(by_name[name], data) for name, data in _results(study, rows.rows).best if data in study.reported]
    on_test = [(variant, [study.reported[data].data]) for variant, data in best]
    yield from _until_time_is_up(on_test, options, started)


def _until_time_is_up(
    todo: Sequence[tuple[Variant, list[DataSet]]], options: StudyOptions, started: float
) -> Iterator[tuple[Variant, list[DataSet]]]:
    for done, (variant, datasets) in enumerate(todo):
        if options.minutes is not None and time.monotonic() - started >= 60 * options.minutes:
            names = ", ".join(f"{left.name} on {', '.join(data.name for data in asked)}" for left, asked in todo[done:])
            print(f"the {options.minutes:g} minutes are over; left, and done by the same command: {names}", file=sys.stderr)
            return
        yield variant, datasets


def _results(study: Study, rows: Sequence[Row]) -> Results:
    order = {variant.name: place for place, variant in enumerate(study.variants)}
    known = sorted((row for row in rows if row.method in order), key=lambda row: order[row.method])
    return Results(study, known, rows, study.choose(rows), study.bench.folder)


def _write(study: Study, rows: Sequence[Row]) -> str:
    results = _results(study, rows)
    return study.write(results) if results.rows else "nothing was asked yet"


def _require_rows_fit(study: Study, variants: Sequence[Variant], rows: RowFile) -> None:
    """Refuse to go on in a folder whose rows other settings made, before anything is meta-trained for it.

    Raises:
        OriginError: naming what differs.
    """
    datasets = [*study.datasets, *(split.data for split in study.reported.values())]
    kept = read_settings(study.bench.folder)
    for variant in variants:
        own = [row for row in rows.rows if row.method == variant.name]
        if variant.training is None or not own:
            continue
        if variant.run is not None:
            run, made_by = name_of_run(resolve(variant.run)), sorted({Path(row.model).name for row in own})
            about = rows.path, f"holds rows of {variant.name}", "choose another --output, or remove those rows"
            if made_by != [run] and variant.name in kept:  # what differs, by its name
                require_made_from(resolve(variant.run).decisive, kept[variant.name]["settings"], *about)
            require_made_from({"run": [run]}, {"run": made_by}, *about)
        # What is still to be meta-trained cannot be hashed: its weights are taken to become those of its rows.
        is_there = variant.run is None or folder_of_run(variant.run, study.bench.folder).is_dir()
        known = prepare(variant, study.bench) if is_there else own[0]
        for data in datasets:
            settings = (
                known.model_sha256,
                data.sha256,
                known.hparams_sha256,
                study.bench.seed,
                protocol_of(study.bench.max_new_tokens),
            )
            rows.require_same_settings(variant.name, data.name, settings)


def _rows_file(study: Study, options: StudyOptions) -> Path:
    """Where the rows of this share, or of the whole study, are."""
    return study.bench.folder / (f"rows-part-{options.part.replace('/', '-of-')}.jsonl" if options.part else "rows.jsonl")


def _open_rows(study: Study, options: StudyOptions) -> RowFile:
    """The rows of this share; those of all shares that are there, if this is the whole study."""
    rows = RowFile(_rows_file(study, options))
    gathered = {row.key: row for row in _gather_rows(study, options)}
    if any(row.error is not None and gathered[row.key].error is None for row in rows.rows):
        rows.forget_failed()  # a share has asked some of them again; the others are gathered too
    known = {row.key for row in rows.rows}
    for key, row in gathered.items():
        if key not in known:
            rows.append(row)
    return rows


def _gather_rows(study: Study, options: StudyOptions) -> list[Row]:
    """The same with nothing written: each case once, as it failed only where it failed in all shares."""
    own = _rows_file(study, options)
    shares = [] if options.part else sorted(own.parent.glob("rows-part-*.jsonl"))
    rows = [row for path in (own, *shares) for row in read_rows(path)]
    gathered: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.error is not None):
        gathered.setdefault(row.key, row)
    return list(gathered.values())


def find_workers(options: StudyOptions) -> Execute | None:
    """Ray's workers if they are asked for; they are started once, whatever is run.

    Raises:
        ConfigError: GPUs for the workers and the device do not go together, or as ``RayWorkers``.
    """
    if options.ray is False:
        return None
    device = resolve_device(options.device)
    if device.startswith("cuda") and not options.gpus_per_worker:
        raise ConfigError(
            "--ray on GPUs needs --gpus-per-worker (1, or a fraction where several workers share one): without it all of them "
            "would take the same one"
        )
    if options.gpus_per_worker and not device.startswith("cuda"):
        raise ConfigError(
            f"--gpus-per-worker {options.gpus_per_worker:g}: workers compute on what this machine computes on, which is {device}; "
            "start the command on a machine that has a GPU"
        )
    address = None if options.ray is True else options.ray
    return RayWorkers(options.workers, address, options.gpus_per_worker, options.cpus_per_worker)


def collect_versions(variants: Sequence[Variant]) -> dict[str, str]:
    """What a row depends on besides its settings."""
    versions = {"python": platform.python_version(), "propmeta_edit": propmeta_edit.__version__}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if not any(variant.edit in BASELINES for variant in variants):
        return versions
    return {**versions, "easyedit": find_form().version, "peft": version("peft")}
