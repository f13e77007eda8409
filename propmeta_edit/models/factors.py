"""Two factors in place of a matrix: ``W x + B A x``, of which both loops move A and B alone; they are a LoRA of PEFT's.

An edit then weighs kilobytes, many edits side by side need no copies of the matrices, and a meta-tuned checkpoint is an adapter of
a few megabytes on the untouched base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.models.artefacts import ADAPTER, ADAPTER_CONFIG, PEFT_PREFIX
from propmeta_edit.models.layers import FACTORS, factored_modules, select_parameters
from propmeta_edit.protocols import LanguageModel

_SUFFIX = f".{FACTORS}.weight"


def attach_factors(model: LanguageModel, layers: Sequence[int] | str | None, modules: str, rank: int, seed: int = 0) -> None:
    """Give every chosen projection factors, in fp32: A [rank, in] drawn by ``seed`` as PEFT does, B [out, rank] of zeros.

    The model says what it said before. From then on ``select_parameters`` gives the factors and not the matrices.

    Raises:
        ConfigError: a rank below 1.
        ModelError: the model has factors already, or a layer or module that there is not.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be a whole number, 1 or more, got {rank!r}")
    if factored_modules(model):
        raise ModelError(f"the model has factors already, in {', '.join(sorted(factored_modules(model))[:3])}, ...")
    names = [name.removesuffix(".weight") for name in select_parameters(model, layers, modules) if name.endswith(".weight")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, names, rank)


def _inject(model: Any, names: Sequence[str], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    is_transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names), fan_in_fan_out=is_transposed)
    inject_adapter_in_model(config, model, adapter_name=FACTORS)
    for module in factored_modules(model).values():
        module.lora_A.float()
        module.lora_B.float()
    model.eval()


def write_factors(model: LanguageModel, folder: Path, base_model: str) -> None:
    """Write them as a LoRA that PEFT loads on ``base_model``: two files, with the configuration of the model beside them.

    Raises:
        ModelError: they cannot be written.
    """
    factors, found = _factors_of(model), factored_modules(model)
    is_transposed = any(module.fan_in_fan_out for module in found.values())
    config = lora_config(dict.fromkeys(found, rank_of(factors)), base_model, is_transposed)
    try:
        write_adapter(folder, as_adapter(factors), config)
        model.config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the factors to {folder}: {error}") from error


def matrix_of(parameter: str) -> str:
    """The projection that a weight is of, or that a factor stands beside, by path."""
    return parameter.partition(".lora_")[0].removesuffix(".weight")


def base_below(checkpoint: str) -> str:
    """What the adapter of a checkpoint of factors says it belongs on; empty where the checkpoint is not here."""
    try:
        return str(json.loads((Path(checkpoint) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError):
        return ""


def rank_of(factors: Mapping[str, torch.Tensor]) -> int:
    """Their rank."""
    return next(len(value) for name, value in factors.items() if ".lora_A." in name)


def as_adapter(factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors by the names that they have in PEFT's files."""
    return {
        f"{PEFT_PREFIX}{name.removesuffix(_SUFFIX)}.weight": value.detach().cpu().contiguous() for name, value in factors.items()
    }


def lora_config(ranks: Mapping[str, int], base_model: str, is_transposed: bool) -> dict[str, Any]:
    """PEFT's description of a LoRA of scale 1.

    Args:
        ranks: of each module, by path.
        is_transposed: whether their weights are [in, out], as GPT-2's.
    """
    most = max(ranks.values())
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "target_modules": sorted(ranks),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """A LoRA's two files, as PEFT loads them, in a folder that is there."""
    save_file(dict(tensors), folder / ADAPTER, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_factors(model: LanguageModel, folder: Path) -> None:
    """Give a model the factors that ``write_factors`` wrote, to the bit.

    Raises:
        ModelError: they are not there, or do not fit the model.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / ADAPTER)
        _inject(model, config["target_modules"], config["r"])
        _put_factors(model, {f"{name.removeprefix(PEFT_PREFIX).removesuffix('.weight')}{_SUFFIX}": v for name, v in stored.items()})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"the factors in {folder} cannot be put into this model: {error}") from error


def _put_factors(model: LanguageModel, values: Mapping[str, torch.Tensor]) -> None:
    """Let the factors have these numbers.

    Raises:
        ValueError: others than the model has, or in other shapes.
    """
    own = _factors_of(model)
    odd = [name for name in {*own, *values} if name not in own or name not in values or own[name].shape != values[name].shape]
    if odd:
        raise ValueError(f"{min(odd)} is not in both, or in another shape")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _factors_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith(_SUFFIX)}
