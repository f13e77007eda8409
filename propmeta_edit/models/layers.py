"""Which parameters a choice of layer and modules means, for each architecture.

Layers are 0-based, as EasyEdit's ``layers`` are: layer 9 is ``model.layers.9``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from propmeta_edit.errors import ModelError
from propmeta_edit.models.layout import Architecture, find_layout, is_projection
from propmeta_edit.protocols import LanguageModel

MODULE_CHOICES = ("attention", "mlp", "attention+mlp")
FACTORS = "metaft"  # what PEFT calls the factors that are moved in place of matrices (``models.factors``)


_LLAMA_LIKE = Architecture("model.layers", ("self_attn",), ("mlp",), "mlp.down_proj", "model.norm")
ARCHITECTURES: dict[str, Architecture] = {  # those that the shortcuts were written for: their numbers need no trial
    "gpt2": Architecture("transformer.h", ("attn",), ("mlp",), "mlp.c_proj", "transformer.ln_f"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma3_text"), _LLAMA_LIKE),
}
_FOUND: WeakKeyDictionary[Any, Architecture] = WeakKeyDictionary()


def get_architecture(model: LanguageModel) -> Architecture:
    """The layout of a model, found from its modules (``models.layout``), or else known by its ``config.model_type``.

    Raises:
        ModelError: neither.
    """
    if model not in _FOUND:
        kind = model.config.model_type
        found = find_layout(model) or ARCHITECTURES.get(kind)
        if found is None or found.blocks not in dict(model.named_modules()):
            raise ModelError(
                f"architecture {kind!r} is not supported; supported are decoders with a list of blocks, each of an attention and "
                f"an MLP that are made of linear layers, such as {', '.join(sorted(ARCHITECTURES))}"
            )
        _FOUND[model] = found
    return _FOUND[model]


def architecture_from_config(config: Any) -> Architecture:
    """The same for a model of which there is the configuration alone; no weights are made.

    Raises:
        ModelError: as ``get_architecture``.
    """
    if config.model_type in ARCHITECTURES:
        return ARCHITECTURES[config.model_type]
    with torch.device("meta"):
        return get_architecture(AutoModelForCausalLM.from_config(config))


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

    Where the model has factors (``models.factors``), those of the projections, and not the projections. Layer norms, embeddings,
    the final norm and the LM head are never among them.

    Returns:
        Parameters by their name in ``model.named_parameters()``, in the model's own order.

    Raises:
        ModelError: unsupported architecture, layer outside the model, unknown module choice, or projections that are not linear
            layers with a weight of their own.
    """
    if modules not in MODULE_CHOICES:
        raise ModelError(f"modules must be one of {', '.join(MODULE_CHOICES)}, got {modules!r}")
    architecture, dtype = get_architecture(model), model.get_input_embeddings().weight.dtype
    chosen: dict[str, nn.Parameter] = {}
    for layer in resolve_layers(layers, len(get_block_list(model))):
        for part, children in (("attention", architecture.attention), ("mlp", architecture.mlp)):
            if part not in modules.split("+"):
                continue
            found = {
                f"{path}.{leaf}": parameter
                for child in children
                for path, projection in _projections_in(model, f"{architecture.blocks}.{layer}.{child}")
                for leaf, parameter in _parameters_of(path, projection, dtype).items()
            }
            if not found:
                raise ModelError(_nothing_to_edit(model, layer, part))
            chosen |= found
    _require_unshared(model, chosen)
    return chosen


def _projections_in(model: LanguageModel, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The projections in a module; in a model with factors, the factors of those that have some."""
    with_factors = bool(factored_modules(model))
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if is_projection(module) and name.endswith(f".{FACTORS}") == with_factors:
            yield name, module


def factored_modules(model: Any) -> dict[str, Any]:
    """The modules that have factors beside their matrix, by path."""
    return {path: module for path, module in model.named_modules() if FACTORS in getattr(module, "lora_A", ())}


def _parameters_of(path: str, projection: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Weight and bias of a projection that computes with nothing else.

    Args:
        dtype: of the model around it.

    Raises:
        ModelError: its class computes in a way of its own, its weight is made of other tensors, or nothing casts around it.
    """
    own = next(kind for kind in type(projection).__mro__ if "forward" in vars(kind))
    found = dict(projection.named_parameters(recurse=False))
    if hasattr(projection, "parametrizations") or not {"weight"} <= found.keys() <= {"weight", "bias"}:
        made_of = ", ".join(name for name, _ in projection.named_parameters())
        raise ModelError(
            f"the weight of {path} is parametrized: it is made anew from {made_of} in every call; make it a parameter of its own "
            "first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
        )
    if own not in (nn.Linear, Conv1D, CastingLinear, CastingConv1D) and not own.__module__.startswith("transformers.models."):
        raise ModelError(
            f"{path} is a {own.__module__}.{own.__name__}, which may compute something else than a linear layer does; edit the "
            "model before its layers are replaced"
        )
    is_cast = isinstance(projection, CastingLinear | CastingConv1D) or path.endswith(f".{FACTORS}")  # peft casts around factors
    if found["weight"].dtype != dtype and not is_cast:
        raise ModelError(
            f"{path} is {found['weight'].dtype} in a model of {dtype}, and nothing casts between them; let load_model (layers=) or "
            "MetaFTHyperParams load the model, which see to that"
        )
    return found


def _nothing_to_edit(model: LanguageModel, layer: int, part: str) -> str:
    if factored := factored_modules(model):
        return f"layer {layer} has no factors in its {part}; those there are are in {', '.join(sorted(factored)[:3])}, ..."
    if part == "mlp" and not get_architecture(model).mlp:
        return f"the MLPs of {model.config.model_type!r} are mixtures of experts, which cannot be edited; set modules to attention"
    return f"there are no linear layers in the {part} of layer {layer}: they were replaced (quantised?); load the model as it was"


def _require_unshared(model: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    places: dict[int, list[str]] = {id(parameter): [] for parameter in parameters.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in places:
                places[id(parameter)].append(f"{path}.{leaf}")
    for names in places.values():
        if len(names) > 1:
            raise ModelError(
                f"{names[0]} is shared: it is {names[1]} as well, and an edit of one layer would be one of both; give each a "
                "tensor of its own (copy.deepcopy of the module)"
            )


def get_block_list(model: LanguageModel) -> nn.ModuleList:
    """The list that the model itself goes through, the lowest layer first."""
    blocks: Any = model.get_submodule(get_architecture(model).blocks)
    found: nn.ModuleList = blocks
    return found


def get_blocks(model: LanguageModel) -> list[nn.Module]:
    """The model's layers, the lowest first."""
    return list(get_block_list(model).children())


def layers_of(model: LanguageModel, parameter_names: Iterable[str]) -> set[int]:
    """The numbers of the layers that hold these parameters."""
    path = get_architecture(model).blocks + "."
    return {int(name.removeprefix(path).split(".")[0]) for name in parameter_names}


def get_final_norm(model: LanguageModel) -> nn.Module:
    """The norm after the last layer; a module that does nothing where there is none."""
    path = get_architecture(model).final_norm
    return model.get_submodule(path) if path else nn.Identity()


def weights_of(model: LanguageModel, leaves: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights of all modules whose own name, the last part of the path, is among ``leaves``."""
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in leaves}  # type: ignore[misc]


def key_module_name(architecture: Architecture, layer: int) -> str:
    """The second projection of a layer's MLP, whose inputs are the keys of ROME, MEMIT and AlphaEdit.

    Raises:
        ModelError: a mixture of experts has none.
    """
    if not architecture.mlp_output:
        raise ModelError("the MLPs of this model are mixtures of experts, whose keys cannot be taken")
    return f"{architecture.blocks}.{layer}.{architecture.mlp_output}"


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
    if "_old_forward" in vars(module):  # accelerate's hook calls what it found there
        vars(module)["_old_forward"] = type(module).forward.__get__(module)
