"""Speed, both sides by turns in one run.

python benchmarks/run_speed.py meta --output results/speed-meta      the engine against the plain loop, tasks of meta-training
python benchmarks/run_speed.py edit --output results/speed-edit      our edits against EasyEdit's FT and the machine's floor
python benchmarks/run_speed.py compile --output results/speed-compile    what torch.compile gives on this machine
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import speed_compile
import speed_edit
import speed_meta
import speed_parts
import torch
from option_types import whole_number, whole_numbers

from propmeta_edit.cli import run_or_exit
from propmeta_edit.evaluation.tables import SETTINGS_FILE, frame_to_markdown, keep_settings
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import DTYPES
from propmeta_edit.recipes.comparison import collect_versions


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SPEEDS))
    shapes = ", ".join(speed_parts.SHAPES)
    parser.add_argument("--models", default="tiny,smollm2-135m", help=f"names, folders, or {shapes}; the last one's ratios count")
    parser.add_argument(
        "--at-once", type=whole_numbers, default="1,2,4,8,16", help="tasks a step, or edits side by side (default %(default)s)"
    )
    parser.add_argument(
        "--layers",
        type=partial(whole_numbers, least=0),
        help="comma-separated (default: a quarter of the depth; meta: the outermost as well)",
    )
    parser.add_argument("--number", type=whole_number, default=16, help="tasks or edits of one measurement (default %(default)s)")
    parser.add_argument(
        "--repeats", type=whole_number, default=5, help="rounds by turns after the first; their median counts (default %(default)s)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fast", choices=[*sorted(DTYPES), "fast"], help="of the frozen rest, at its best")
    parser.add_argument("--output", default="results/speed")
    options = parser.parse_args(argv)
    if options.number < max(options.at_once):
        sizes = ",".join(str(size) for size in options.at_once)
        parser.error(f"--number must be at least the largest of --at-once ({sizes}), got {options.number}")
    return options


def keep(
    rows: Iterable[dict[str, Any]], describe: Callable[[list[dict[str, Any]]], dict[str, Any]], output: Path
) -> dict[str, Any]:
    """What ``describe`` makes of all rows, and they; each is shown, and in ``speed.csv`` and ``speed.json``, once measured."""
    found: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for row in rows:
        print(json.dumps(row), flush=True)
        found.append(row)
        result = {**describe(found), "rows": found}
        write_text_atomically(output / "speed.csv", pd.DataFrame(found).to_csv(index=False))
        write_json(result, output)
    return result


def write_json(result: dict[str, Any], output: Path) -> None:
    write_text_atomically(output / "speed.json", json.dumps(result, indent=1) + "\n")


def measure_meta(options: argparse.Namespace, names: list[str], device: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of ``speed_meta``, model by model."""
    for name in names:
        yield from speed_meta.compare(name, device, dtype, options.at_once, options.layers, options.number, options.repeats)


def measure_edit(options: argparse.Namespace, names: list[str], device: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of ``speed_edit``: how they grow with edits side by side, steps and prompts, on the last model alone."""
    sizes = options.at_once
    settings = []
    for name in reversed(names):  # the last model first: it is the one that counts
        layer = options.layers[0] if options.layers else speed_parts.depth_of(name) // 4
        base = speed_edit.Setting(name, device, dtype, layer, at_once=max(sizes))
        settings.append(base)
        if name == names[-1]:
            settings += [replace(base, at_once=size) for size in sizes if size not in (1, max(sizes))]
            settings += [replace(base, num_steps=steps) for steps in (5, 20)] + [replace(base, filler=words) for words in (50, 200)]
    return speed_edit.compare(settings, options.number, options.repeats)


def measure_compile(options: argparse.Namespace, names: list[str], device: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of ``speed_compile``, model by model."""
    layers = [options.layers[0] if options.layers else speed_parts.depth_of(name) // 4 for name in names]
    settings = [
        speed_edit.Setting(name, device, dtype, layer, at_once=size)
        for name, layer in zip(names, layers, strict=True)
        for size in options.at_once
    ]
    return speed_compile.compare(settings, options.number, options.repeats)


SPEEDS = {
    "meta": (measure_meta, speed_meta.summarise),
    "edit": (measure_edit, speed_edit.summarise),
    "compile": (measure_compile, speed_compile.summarise),
}


def run(options: argparse.Namespace) -> None:
    names = options.models.split(",")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    measure, summarise = SPEEDS[options.what]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    about = {"what": options.what, "device": name, "torch": torch.__version__}
    output = Path(options.output)
    result = keep(measure(options, names, device, dtype), lambda rows: {**about, **summarise(rows)}, output)
    asked = {key: value for key, value in vars(options).items() if key not in ("what", "output")}
    (output / SETTINGS_FILE).unlink(missing_ok=True)  # of other numbers, which are not there any more either
    keep_settings({options.what: {**asked, "device": name, "dtype": dtype, "versions": collect_versions([])}}, output)
    if options.what == "meta":
        result["growth"] = speed_meta.check_growth(names[-1], device, dtype, options.number)
        write_json(result, output)
    table = frame_to_markdown(pd.DataFrame(result["rows"]), ".3g")
    write_text_atomically(output / "speed.md", table)
    print(table)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for what the user can mend."""
    options = parse_arguments(argv)
    return run_or_exit(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
