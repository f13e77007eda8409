"""Which parameters a choice of layer and modules means, for each architecture.

Layers are 0-based, as EasyEdit's ``layers`` are: layer 9 is ``model.layers.9``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.errors import ModelError
from propmeta_edit.protocols import LanguageModel

MODULE_CHOICES = ("attention", "mlp", "attention+mlp")


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its blocks and final norm, and, inside a block, its attention, MLP and that one's second projection."""

    blocks: str
    attention: str
    mlp: str
    mlp_output: str
    final_norm: str


_LLAMA_LIKE = Architecture(blocks="model.layers", attention="self_attn", mlp="mlp", mlp_output="down_proj", final_norm="model.norm")
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(blocks="transformer.h", attention="attn", mlp="mlp", mlp_output="c_proj", final_norm="transformer.ln_f"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma3_text"), _LLAMA_LIKE),
}


def get_architecture(model_type: str) -> Architecture:
    """The layout of a ``config.model_type``.

    Raises:
        ModelError: an architecture this package has no layout for.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(f"architecture {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


def default_layer(num_layers: int) -> int:
    """The layer to start from on a model the paper did not use: about a quarter of its depth."""
    return num_layers // 4


def resolve_layers(layers: Sequence[int] | str | None, num_layers: int) -> list[int]:
    """Turn a setting into layer numbers: a list of them, ``"all"``, or None for the default layer.

    Raises:
        ModelError: a layer outside ``0 .. num_layers - 1``, or nothing that names layers.
    """
    if layers is None:
        return [default_layer(num_layers)]
    if layers == "all":
        return list(range(num_layers))
    if isinstance(layers, str) or not layers:
        raise ModelError(f"layers must be a list of layer numbers, 'all' or null, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ModelError(f"layer {layer!r} is outside the model: it has layers 0 to {num_layers - 1} (0-based)")
    return list(layers)


def select_parameters(
    model: LanguageModel, layers: Sequence[int] | str | None, modules: str = "attention+mlp"
) -> dict[str, nn.Parameter]:
    """The parameters that both loops train: every projection, with its bias, of the chosen modules of the chosen layers.

    Layer norms, embeddings, the final norm and the LM head are never among them.

    Returns:
        Parameters by their name in ``model.named_parameters()``, in the model's own order.

    Raises:
        ModelError: unsupported architecture, layer outside the model, or unknown module choice.
    """
    if modules not in MODULE_CHOICES:
        raise ModelError(f"modules must be one of {', '.join(MODULE_CHOICES)}, got {modules!r}")
    architecture = get_architecture(model.config.model_type)
    blocks = model.get_submodule(architecture.blocks)
    chosen: dict[str, nn.Parameter] = {}
    for layer in resolve_layers(layers, len(list(blocks.children()))):
        for part, child in (("attention", architecture.attention), ("mlp", architecture.mlp)):
            if part not in modules.split("+"):
                continue
            module_name = f"{architecture.blocks}.{layer}.{child}"
            for name, projection in model.get_submodule(module_name).named_modules():
                if isinstance(projection, nn.Linear | Conv1D):
                    for leaf, parameter in projection.named_parameters(recurse=False):
                        chosen[f"{module_name}.{name}.{leaf}"] = parameter
    return chosen


def get_block_list(model: LanguageModel) -> nn.ModuleList:
    """The list that the model itself goes through, the lowest layer first."""
    blocks: Any = model.get_submodule(get_architecture(model.config.model_type).blocks)
    found: nn.ModuleList = blocks
    return found


def get_blocks(model: LanguageModel) -> list[nn.Module]:
    """The model's layers, the lowest first."""
    return list(get_block_list(model).children())


def layers_of(model: LanguageModel, parameter_names: Iterable[str]) -> set[int]:
    """The numbers of the layers that hold these parameters."""
    path = get_architecture(model.config.model_type).blocks + "."
    return {int(name.removeprefix(path).split(".")[0]) for name in parameter_names}


def get_final_norm(model: LanguageModel) -> nn.Module:
    """The norm after the last layer."""
    norm: nn.Module = model.get_submodule(get_architecture(model.config.model_type).final_norm)
    return norm


def weights_of(model: LanguageModel, leaves: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights of all modules whose own name, the last part of the path, is among ``leaves``."""
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in leaves}  # type: ignore[misc]


def key_module_name(model_type: str, layer: int) -> str:
    """The second projection of a layer's MLP, whose inputs are the keys of ROME, MEMIT and AlphaEdit."""
    architecture = get_architecture(model_type)
    return f"{architecture.blocks}.{layer}.{architecture.mlp}.{architecture.mlp_output}"


def key_width(projection: Any) -> int:
    """How many numbers a key has."""
    return int(projection.weight.shape[0 if isinstance(projection, Conv1D) else 1])


def num_parameters(parameters: dict[str, nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters.values())


class CastingLinear(nn.Linear):
    """A linear layer that computes in its weight's dtype: inputs are cast to it, outputs back to the inputs'."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.to(self.weight.dtype)).to(inputs.dtype)


class CastingConv1D(Conv1D):  # type: ignore[misc]
    """The same for GPT-2's projections."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(inputs.to(self.weight.dtype))
        return output.to(inputs.dtype)


def cast_around(module: nn.Module) -> None:
    """Let one projection compute in its own dtype inside a model of another one, so that an fp32 layer works between bf16 layers.

    The module changes its class, not its identity: copies of the model cast around their own weights.
    """
    if isinstance(module, Conv1D):
        module.__class__ = CastingConv1D
    elif isinstance(module, nn.Linear):
        module.__class__ = CastingLinear
