"""The speed benchmarks: what is measured, and the rows, table and ratios that are kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.tables import SETTINGS_FILE, frame_to_markdown, keep_settings
from propmeta_edit.files import write_text_atomically
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.options import Files, WholeNumbers, require_at_least
from propmeta_edit.speed import asking, edits, meta_training, parts
from propmeta_edit.studies.engine import collect_versions

AT_ONCE, MODELS = WholeNumbers((1, 2, 4, 8, 16)), Files(("tiny", "smollm2-135m"))


@dataclass(frozen=True)
class SpeedOptions:
    """What every speed benchmark can be told.

    Args:
        models: names, folders, or shapes with random weights (tiny, llama3-8b-shape); the last one's ratios count.
        at_once: tasks a step, or edits side by side.
        layers: of the trained tensors (default: a quarter of the depth; of meta-training the outermost as well).
        number: tasks or edits of one measurement.
        repeats: rounds by turns after the first; their median counts.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: of the frozen rest, at its best: float32, bfloat16, float16 or fast.
        output: folder (default: results/speed-<what>).
    """

    models: Files = field(default_factory=lambda: MODELS)
    at_once: WholeNumbers = field(default_factory=lambda: AT_ONCE)
    layers: WholeNumbers | None = None
    number: int = 16
    repeats: int = 5
    device: str = "auto"
    dtype: str = "fast"
    output: str | None = None

    def __post_init__(self) -> None:
        require_at_least(1, number=self.number, repeats=self.repeats, at_once=min(self.at_once))
        require_at_least(0, layers=min(self.layers or [0]))
        if self.number < max(self.at_once):
            sizes = ",".join(str(size) for size in self.at_once)
            raise ConfigError(f"--number must be at least the largest of --at-once ({sizes}), got {self.number}")

    def layer_of(self, model: str) -> int:
        """The first of the layers."""
        return self.layers[0] if self.layers else parts.depth_of(model) // 4


def speed_meta(options: SpeedOptions) -> None:
    """Time the tasks of meta-training: the engine against the plain loop."""

    def measure(device: str, dtype: str) -> Iterator[dict[str, Any]]:
        for name in options.models:
            yield from meta_training.compare(name, device, dtype, options.at_once, options.layers, options.number, options.repeats)

    _run("meta", measure, meta_training.summarise, options)


def speed_edit(options: SpeedOptions) -> None:
    """Time edits: ours, one and many at once, against EasyEdit's FT and what the machine allows at best.

    How they grow with edits side by side, steps and prompts is measured on the last model alone.
    """

    def measure(device: str, dtype: str) -> Iterator[dict[str, Any]]:
        sizes, settings = options.at_once, []
        for name in reversed(options.models):  # the last model first: it is the one that counts
            base = edits.Setting(name, device, dtype, options.layer_of(name), at_once=max(sizes))
            settings.append(base)
            if name == options.models[-1]:
                settings += [replace(base, at_once=size) for size in sizes if size not in (1, max(sizes))]
                settings += [replace(base, num_steps=steps) for steps in (5, 20)]
                settings += [replace(base, filler=words) for words in (50, 200)]
        return edits.compare(settings, options.number, options.repeats)

    _run("edit", measure, edits.summarise, options)


def speed_ask(options: SpeedOptions) -> None:
    """Time what a case is asked: one greedy loop for all prompts against transformers' generate."""

    def measure(device: str, dtype: str) -> Iterator[dict[str, Any]]:
        for name in options.models:
            yield from asking.compare(name, device, dtype, "world-ood", options.number, options.repeats)

    _run("ask", measure, asking.summarise, options)


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


def _run(
    what: str,
    measure: Callable[[str, str], Iterable[dict[str, Any]]],
    summarise: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    options: SpeedOptions,
) -> None:
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    output = Path(options.output or f"results/speed-{what}")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    about = {"what": what, "device": name, "torch": torch.__version__}
    result = keep(measure(device, dtype), lambda rows: {**about, **summarise(rows)}, output)
    asked = {key: value for key, value in vars(options).items() if key != "output"}
    (output / SETTINGS_FILE).unlink(missing_ok=True)  # of other numbers, which are not there any more either
    keep_settings({what: {**asked, "device": name, "dtype": dtype, "versions": collect_versions([])}}, output)
    if what == "meta":
        result["growth"] = meta_training.check_growth(options.models[-1], device, dtype, options.number)
        write_json(result, output)
    table = frame_to_markdown(pd.DataFrame(result["rows"]), ".3g")
    write_text_atomically(output / "speed.md", table)
    print(table)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
