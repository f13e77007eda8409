"""Speed of the engine against the plain loops, both sides by turns in one run.

python benchmarks/run_speed.py meta --output results/speed-meta
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import reference_loops
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from propmeta_edit.cli import run_or_exit
from propmeta_edit.data.cre import load_cre
from propmeta_edit.errors import ConfigError
from propmeta_edit.files import write_text_atomically
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import apply_outer_step
from propmeta_edit.metatrain.trainer import compute_step_gradients, order_tasks
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.layers import MODULE_CHOICES, cast_around, select_parameters
from propmeta_edit.models.loading import DTYPES, load_model, prepare_tokenizer
from propmeta_edit.recipes.worlds import ensure_world
from propmeta_edit.records import MetaTask

SHAPES: dict[str, dict[str, Any]] = {  # random weights; the tokenizer is the bundled model's, whose ids fit into all of them
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 49152},
    "llama3-8b-shape": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
KINDS = {"products": ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul"), "optimiser": ("adamw", "adam")}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["meta"], help="meta: meta-training")
    parser.add_argument(
        "--models", default="tiny,smollm2-135m", help=f"names, folders, or {', '.join(SHAPES)} (default %(default)s)"
    )
    parser.add_argument("--tasks-per-step", default="1,2,4,8,16", help="for the engine (default %(default)s)")
    parser.add_argument("--layers", help="comma-separated; default: a quarter of the depth, and the first and the last layer")
    parser.add_argument("--num-tasks", type=int, default=16, help="of one measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds by turns; the median counts (default %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="fast", choices=[*sorted(DTYPES), "fast"], help="of the frozen rest, for the best setting"
    )
    parser.add_argument("--output", default="results/speed")
    return parser.parse_args(argv)


def load(name: str, device: str, dtype: str, layers: Sequence[int], modules: str) -> tuple[Any, Any]:
    """A model to time, its trained tensors in fp32."""
    if name not in SHAPES:
        return load_model(name, device=device, dtype=dtype, layers=layers, modules=modules)
    config = LlamaConfig(**SHAPES[name])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation="eager" if device == "cpu" else None
        ).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder("smollm2-135m"))
    prepare_tokenizer(tokenizer)
    if dtype != "float32":
        for name, parameter in select_parameters(model, layers, modules).items():
            parameter.data = parameter.data.float()
            cast_around(model.get_submodule(name.rpartition(".")[0]))
    return model, tokenizer


def read_tasks(number: int) -> list[MetaTask]:
    cases = load_cre(ensure_world() / "train_data_id.jsonl", seed=0)
    return order_tasks([case.as_task() for case in cases], 0, number)


class Side:
    """One way to meta-train, on a model of its own; ``run`` is one measurement."""

    def __init__(self, name: str, model: Any, tokenizer: Any, config: MetaTrainConfig, is_reference: bool) -> None:
        self.name, self.model, self.tokenizer, self.config = name, model, tokenizer, config
        self.parameters = select_parameters(model, config.layers, config.modules)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.outer_lr, fused=not is_reference)
        self.is_reference = is_reference

    def run(self, tasks: Sequence[MetaTask]) -> float:
        """Seconds a task."""
        started = time.perf_counter()
        with only_trainable(self.model, self.parameters):
            for start in range(0, len(tasks), self.config.tasks_per_step):
                self._step(tasks[start : start + self.config.tasks_per_step])
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(tasks)

    def _step(self, some: Sequence[MetaTask]) -> None:
        if not self.is_reference:
            gradients = compute_step_gradients(self.model, self.tokenizer, self.parameters, some, self.config)
            apply_outer_step(self.optimizer, self.parameters, gradients)
            return
        own = [
            reference_loops.task_gradients(self.model, self.tokenizer, self.parameters, task, self.config.inner)[0] for task in some
        ]
        reference_loops.outer_step(self.optimizer, self.parameters, own)


def measure(sides: Sequence[Side], tasks: Sequence[MetaTask], repeats: int) -> dict[str, float]:
    """Median seconds a task of each side, measured by turns after one round that does not count."""
    for side in sides:
        side.run(tasks[: side.config.tasks_per_step])
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            times[side.name].append(side.run(tasks))
    return {name: median(values) for name, values in times.items()}


def peak_memory(make: Callable[[], Side], tasks: Sequence[MetaTask]) -> float:
    """GiB that a run adds to a loaded model, in a process of its own; on CUDA by the device's own count."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, make, tasks))
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError("a measurement of memory failed; its message is above")
    peak: float = receiver.recv()
    return peak


def _send_peak(sender: Any, make: Callable[[], Side], tasks: Sequence[MetaTask]) -> None:
    side = make()
    on_cuda = side.model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side.run(tasks)
    after = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sender.send((after - before) / 2**30)


def share_of_time(side: Side, tasks: Sequence[MetaTask]) -> dict[str, float]:
    """Which share of the operators' own time is matrix products, the optimisers, and everything else."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if side.model.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        side.run(tasks)
    on_cuda = side.model.device.type == "cuda"
    own: dict[str, float] = {"products": 0.0, "optimiser": 0.0, "other": 0.0}
    for event in profiled.key_averages():
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        leaf = event.key.removeprefix("aten::").lstrip("_")
        kind = next((k for k, names in KINDS.items() if any(leaf == n or (k == "optimiser" and n in leaf) for n in names)), "other")
        own[kind] += spent
    total = sum(own.values()) or 1.0
    return {kind: spent / total for kind, spent in own.items()}


def make_side(name: str, model_name: str, device: str, config: MetaTrainConfig, is_reference: bool = False) -> Side:
    return Side(name, *load(model_name, device, config.dtype, list(config.layers or []), config.modules), config, is_reference)


class Maker:
    """``make_side`` with its arguments, for another process."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self) -> Side:
        return make_side(*self.arguments)


def compare(model_name: str, options: argparse.Namespace, tasks: Sequence[MetaTask]) -> list[dict[str, Any]]:
    """All measurements on one model."""
    device = resolve_device(options.device)
    fast = resolve_dtype(options.dtype, device)
    depth = SHAPES[model_name]["num_hidden_layers"] if model_name in SHAPES else _depth_of(model_name)
    layers = [int(layer) for layer in options.layers.split(",")] if options.layers else [depth // 4, 0, depth - 1]
    base = MetaTrainConfig(model=model_name, layers=layers[:1], inner_lr=1e-3, outer_lr=1e-4, dtype="float32")
    steps = [int(number) for number in options.tasks_per_step.split(",")]
    rows = []
    variants = [(base, "float32")] + ([(replace(base, dtype=fast), fast)] if fast != "float32" else [])
    for config, dtype in variants:
        rows += _compare_with_reference(model_name, device, config, steps, tasks, options.repeats, note=f"frozen rest {dtype}")
    best = replace(base, dtype=fast, tasks_per_step=max(steps))
    for layer in layers[1:]:
        rows += _compare_with_reference(
            model_name, device, replace(best, layers=[layer]), [max(steps)], tasks, options.repeats, "layer"
        )
    for modules in MODULE_CHOICES[:2]:
        rows += _compare_with_reference(
            model_name, device, replace(best, modules=modules), [max(steps)], tasks, options.repeats, "modules"
        )
    return rows


def _compare_with_reference(
    model_name: str,
    device: str,
    config: MetaTrainConfig,
    steps: Sequence[int],
    tasks: Sequence[MetaTask],
    repeats: int,
    note: str,
) -> list[dict[str, Any]]:
    reference = make_side("reference", model_name, device, replace(config, tasks_per_step=1), True)
    sides = [reference]
    for number in steps:  # the engine never writes to the frozen weights, and every side puts the trained ones where it wants them
        sides.append(Side(f"engine {number}", reference.model, reference.tokenizer, replace(config, tasks_per_step=number), False))
    times = measure(sides, tasks, repeats)
    rows = []
    for side in sides:
        maker = Maker(side.name, model_name, device, side.config, side.is_reference)
        rows.append(
            {
                "model": model_name,
                "note": note,
                "layer": (config.layers or [None])[0],
                "modules": config.modules,
                "frozen dtype": config.dtype,
                "side": "reference" if side.is_reference else "engine",
                "tasks a step": side.config.tasks_per_step,
                "seconds a task": times[side.name],
                "times reference": times["reference"] / times[side.name],
                "peak GiB added": peak_memory(maker, tasks),
                **{f"share {kind}": share for kind, share in share_of_time(side, tasks[: side.config.tasks_per_step]).items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _depth_of(model_name: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(resolve_model_folder(model_name)).num_hidden_layers)


def summarise(rows: Sequence[Mapping[str, Any]], model_name: str) -> dict[str, Any]:
    """The two ratios that are asked for, on one model: at the best number of tasks a step, and at one in equal dtype."""
    own = [row for row in rows if row["model"] == model_name and row["side"] == "engine" and row["note"].startswith("frozen")]
    plain = [row for row in own if row["frozen dtype"] == "float32"]
    # The best setting (bf16, many tasks) against the reference loop as it is in fp32.
    reference = next(
        row["seconds a task"]
        for row in rows
        if row["model"] == model_name and row["side"] == "reference" and row["frozen dtype"] == "float32"
    )
    best = min(own, key=lambda row: row["seconds a task"])
    return {
        "model": model_name,
        "engine_vs_reference": reference / best["seconds a task"],
        "best": {key: best[key] for key in ("frozen dtype", "tasks a step", "seconds a task")},
        "engine_vs_reference_one_task": next(row["times reference"] for row in plain if row["tasks a step"] == 1),
    }


def check_growth(model_name: str, options: argparse.Namespace, tasks: Sequence[MetaTask]) -> list[dict[str, Any]]:
    """Seconds and added memory at N, 2N and 4N tasks."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config = MetaTrainConfig(model=model_name, layers=[1], inner_lr=1e-3, outer_lr=1e-4, dtype=dtype, tasks_per_step=4)
    side = make_side("engine 4", model_name, device, config)
    side.run(tasks[:4])
    rows = []
    for factor in (1, 2, 4):
        many = [*tasks] * factor
        seconds = side.run(many) * len(many)
        peak = peak_memory(Maker("engine 4", model_name, device, config), many)
        rows.append({"tasks": len(many), "seconds": seconds, "peak GiB added": peak})
    return rows


def run(options: argparse.Namespace) -> None:
    names = options.models.split(",")
    tasks = read_tasks(options.num_tasks)
    rows = [row for name in names for row in compare(name, options, tasks)]
    result = {
        "what": options.what,
        "device": resolve_device(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **summarise(rows, names[-1]),
        "growth": check_growth(names[-1], options, tasks),
        "rows": rows,
    }
    output = Path(options.output)
    write_text_atomically(output / "speed.json", json.dumps(result, indent=1) + "\n")
    write_text_atomically(output / "speed.csv", pd.DataFrame(rows).to_csv(index=False))
    print(pd.DataFrame(rows).drop(columns=["model"]).round(3).to_string(index=False))
    print(json.dumps({key: value for key, value in result.items() if key not in ("rows",)}, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for what the user can mend."""
    options = parse_arguments(argv)
    return run_or_exit(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
