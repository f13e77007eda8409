"""What the speed benchmarks share: models to time, rounds by turns, shares of time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from propmeta_edit.data.cre import load_cre
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import free_unused, is_out_of_memory
from propmeta_edit.models.layers import cast_around, select_parameters
from propmeta_edit.models.loading import DTYPES, load_model, prepare_tokenizer, read_model_config
from propmeta_edit.recipes.worlds import ensure_world
from propmeta_edit.records import Case

T = TypeVar("T")
NO_MEMORY = "out of memory"
SHAPES: dict[str, dict[str, Any]] = {  # random weights; the tokenizer is the bundled model's, whose ids fit into all of them
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 49152},
    "llama3-8b-shape": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
KINDS = {
    "products": ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "mkldnn::_linear_pointwise"),
    "optimiser": ("adamw", "adam"),
}


def load(name: str, device: str, dtype: str, layers: Sequence[int] | str, modules: str) -> tuple[Any, Any]:
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


def depth_of(name: str) -> int:
    """How many layers a model has, without loading it."""
    if name in SHAPES:
        return int(SHAPES[name]["num_hidden_layers"])
    return int(read_model_config(resolve_model_folder(name)).num_hidden_layers)


def read_cases(number: int) -> list[Case]:
    """Training cases of the offline world."""
    return load_cre(ensure_world() / "train_data_id.jsonl", seed=0)[:number]


def run_if_it_fits(run: Callable[[], T]) -> T | None:
    """What a run gives, or None if memory ran out, on a GPU or in the machine; what the run took is free again."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_unused()  # out here, since the error holds what its frames hold
    return None


def ratio(one: float | None, other: float | None) -> float | None:
    """Of two measurements, if both could be made."""
    return None if one is None or other is None else one / other


class Timing(NamedTuple):
    """What one side took: in the round that does not count, and the median of the others."""

    first: float
    usual: float

    def once(self, number: int) -> float:
        """Seconds that the first round's calls took on top, where each value is a mean over so many."""
        return max(0.0, (self.first - self.usual) * number)


def measure(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Timing]:
    """Each side's own measurement, all sides by turns, after one round that does not count.

    A side whose memory runs out is left out of the rounds to come, and of what is returned.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name in list(times):
            seconds = run_if_it_fits(sides[name])
            if seconds is None:
                del times[name]
            else:
                times[name].append(seconds)
    return {name: Timing(values[0], median(values[1:])) for name, values in times.items()}


def share_of_time(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Which share of the operators' own time is matrix products, the optimisers, and everything else."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        run()
    return add_shares(profiled.key_averages(), on_cuda)


def add_shares(events: Iterable[Any], on_cuda: bool) -> dict[str, float]:
    """The shares of ``share_of_time`` from the profiler's events.

    On CUDA an operator has the time of the kernels that it started, and each kernel, and each annotation such as
    ``Optimizer.step#AdamW.step``, comes with the same time once more: operators alone are counted.
    """
    own: dict[str, float] = {"products": 0.0, "optimiser": 0.0, "other": 0.0}
    for event in events:
        if on_cuda and (event.device_type != DeviceType.CPU or event.is_user_annotation):
            continue
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        leaf = event.key.removeprefix("aten::").lstrip("_")
        kind = next((k for k, names in KINDS.items() if any(leaf == n or (k == "optimiser" and n in leaf) for n in names)), "other")
        own[kind] += spent
    total = sum(own.values()) or 1.0
    return {f"share {kind}": spent / total for kind, spent in own.items()}
