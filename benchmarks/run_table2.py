"""Table 2: MetaFT against FT, ROME, MEMIT, AlphaEdit and CaKE, on two-hop questions about edited facts.

python benchmarks/run_table2.py --model smollm2-135m --limit 40 --output results/table2
python benchmarks/run_table2.py --minutes-per-row 2                                      (as many cases as that allows, row by row)
python benchmarks/run_table2.py --methods all --limit 300 --output results/evidence      (with the controls)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import published

from propmeta_edit.cli import exit_code_of
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.comparisons import write_comparisons
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import Execute, run_methods
from propmeta_edit.evaluation.tables import require_comparable, summarise, write_settings, write_tables
from propmeta_edit.evaluation.workers import RayWorkers
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import DTYPES
from propmeta_edit.recipes.comparison import (
    CONTROLS,
    CORE,
    METHODS,
    NOTES,
    VARIANTS,
    Setup,
    collect_versions,
    make_specs,
    require_same_base,
)
from propmeta_edit.recipes.data_sets import LOADERS, load_datasets
from propmeta_edit.recipes.plan import describe_plan
from propmeta_edit.recipes.splits import is_released


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base model: bundled name, folder or hub id (default %(default)s)")
    parser.add_argument("--metaft-model", help="its meta-tuned checkpoint (default: <model>-metaft)")
    parser.add_argument(
        "--hparams", help="name of the YAML in hparams/<method>/ (default: the model's name; else as the checkpoint was trained)"
    )
    parser.add_argument(
        "--checkpoints",
        default="",
        help=f"meta-trained models of the controls, e.g. k0=FOLDER,shuffled=FOLDER; else <model>-k0 and so on "
        f"({', '.join(sorted({kind.checkpoint for kind in CONTROLS.values()}))})",
    )
    parser.add_argument(
        "--methods",
        default=",".join(CORE),
        help=f"comma-separated rows (default %(default)s), or all for {', '.join(CONTROLS)} as well; further ones: "
        f"{', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--edits-at-once",
        type=int,
        default=8,
        help="cases of FT and MetaFT side by side (default %(default)s); halved where memory runs out, which the table says",
    )
    parser.add_argument(
        "--datasets",
        default="cre-id,cre-ood",
        help=f"comma-separated, each NAME, FILE, NAME=FILE, or CRE's FOLDER or hub:owner/name; names: {', '.join(LOADERS)} "
        "(default %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="cases per data set (default: all); a larger one continues a smaller one")
    parser.add_argument(
        "--limits", default="", help="other numbers for single methods, e.g. ROME=8, since it is slow (comma-separated)"
    )
    parser.add_argument(
        "--minutes-per-row",
        type=float,
        help="stop a method once its cases, all data sets together, have taken so long: slower methods get fewer cases; loading "
        "and preparation are not counted, cases on disk are (default: no bound)",
    )
    parser.add_argument("--output", default="results/table2", help="folder for rows.jsonl and the tables (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        default="fast",
        choices=[*sorted(DTYPES), "fast"],
        help="of the frozen rest; fast: bfloat16 where the device has it in hardware, else float32 (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry-failed", action="store_true", help="run the cases again that failed in former runs")
    parser.add_argument("--plan", action="store_true", help="say what would run, with memory, disk and time, and start nothing")
    add_worker_options(parser)
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be 1 or more, got {options.limit}")
    if options.minutes_per_row is not None and options.minutes_per_row <= 0:
        parser.error(f"--minutes-per-row must be more than 0, got {options.minutes_per_row}")
    if options.edits_at_once < 1:
        parser.error(f"--edits-at-once must be 1 or more, got {options.edits_at_once}")
    options.methods = ",".join([*CORE, *CONTROLS]) if options.methods == "all" else options.methods
    try:
        options.limits = {name: int(value) for name, value in _pairs(options.limits)}
        options.checkpoints = dict(_pairs(options.checkpoints))
    except ValueError:
        parser.error("--limits must be METHOD=NUMBER,... and --checkpoints NAME=FOLDER,...")
    if set(options.limits) - set(METHODS):
        parser.error(f"--limits names methods that are not among {', '.join(METHODS)}: {options.limits}")
    return options


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Where the cases are asked; ``find_workers`` reads it."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="spread the cases over Ray workers, of the cluster at ADDRESS (auto: the one this machine belongs to) or, without it, "
        "on this machine",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="with --ray: processes, each with its own model (default %(default)s)"
    )
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="with --ray: a fraction shares one (default %(default)s)")
    parser.add_argument("--cpus-per-worker", type=float, default=1, help="with --ray (default %(default)s)")


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [item.split("=", 1) for item in text.split(",") if item.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(text)
    return [(name.strip(), value.strip()) for name, value in pairs]


def run(options: argparse.Namespace) -> int:
    """The whole comparison; returns how many cases failed."""
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigError(f"unknown methods {', '.join(unknown) or repr(options.methods)}; choose from {', '.join(METHODS)}")
    items = [item.strip() for item in options.datasets.split(",") if item.strip()]
    datasets = [data for item in items for data in load_datasets(item, options.seed)]
    rows = RowFile(Path(options.output) / "rows.jsonl")
    hparams_name = options.hparams or Path(options.model).name
    checkpoints = {**options.checkpoints, **({"metaft": options.metaft_model} if options.metaft_model else {})}
    device = resolve_device(options.device)
    if options.ray is not None and device.startswith("cuda"):
        device = "cuda:0"  # a worker sees no GPU but its own
    dtype = resolve_dtype(options.dtype, device)
    setup = Setup(options.model, checkpoints, device, dtype, options.seed, options.edits_at_once)
    if options.plan:
        budget = options.minutes_per_row
        print(describe_plan(names, setup, hparams_name, datasets, rows, options.limit, options.limits, budget))
        return 0
    versions = collect_versions(names)
    resolve_model_folder(options.model)
    for kind in {METHODS[name].checkpoint: METHODS[name] for name in names if METHODS[name].checkpoint}.values():
        require_same_base(setup, kind)
    execute = find_workers(options)  # before second moments are gathered for the rows
    specs = make_specs(names, setup, hparams_name)
    require_comparable([*rows.rows, *(spec.make_row(data, "", options.seed) for spec in specs for data in datasets)])
    if options.retry_failed:
        print(f"{rows.forget_failed()} cases that failed run again", file=sys.stderr)
    write_settings(specs, options.output)
    failures = run_methods(
        specs,
        datasets,
        rows,
        limit=options.limit,
        limits=options.limits,
        budget=None if options.minutes_per_row is None else 60 * options.minutes_per_row,
        seed=options.seed,
        versions=versions,
        execute=execute,
    )
    order = {name: place for place, name in enumerate(METHODS)}
    in_order = sorted(rows.rows, key=lambda row: order.get(row.method, len(order)))  # a row of another script comes last
    notes = [*NOTES]
    if options.minutes_per_row is not None:
        notes.append(f"n: as many cases as a row got through in {options.minutes_per_row:g} min, data sets by turns.")
    if options.ray is not None:
        notes.append(
            f"s / edit: taken while up to {options.workers} workers shared a machine; for times to cite, run without --ray."
        )
    if hparams_name in published.TABLE_2_MODELS and any(is_released(item) for item in items):
        write_text_atomically(Path(options.output) / "published.md", published.table_2_markdown())
        notes.append(
            "published.md: what the paper reports for its Llama3-8B, cited with its protocol; whether yours is that is not checked."
        )
    print(write_tables(summarise(in_order), options.output, notes))
    write_comparisons(in_order, options.output, ("FT", "MetaFT"))
    print(f"paired comparisons with FT and MetaFT, breakdowns and examples: {Path(options.output) / 'comparisons.md'}")
    if failures:
        print(f"{failures} cases failed; their tracebacks are in {rows.path}", file=sys.stderr)
    return failures


def find_workers(options: argparse.Namespace) -> Execute | None:
    """Ray's workers if they are asked for; they are started once, whatever is run.

    Raises:
        ConfigError: GPUs for the workers and the device do not go together, or as ``RayWorkers``.
    """
    if options.ray is None:
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
    address = None if options.ray == "local" else options.ray
    return RayWorkers(options.workers, address, options.gpus_per_worker, options.cpus_per_worker)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 if cases failed, 2 for what the user can mend."""
    options = parse_arguments(argv)
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
