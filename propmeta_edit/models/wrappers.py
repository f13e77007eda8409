"""What torch and its libraries put around a model or into it: taken off where that gives the model itself, else refused.

A wrapper may give tensors other names, hold them in pieces, elsewhere or in fewer bits, or compute something else from them. An
edit is made of the tensors that the model itself computes with, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from propmeta_edit.errors import ModelError
from propmeta_edit.models.layers import FACTORS
from propmeta_edit.protocols import LanguageModel

_COMPILED = "_orig_mod"  # where torch.compile's module keeps the one it compiles
_CHECKPOINTED = "_checkpoint_wrapped_module"  # where torch.distributed's wrappers for activations keep theirs
_AROUND_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.")
_MERGE = (
    "the model has adapters of peft: merge them (model = peft_model.merge_and_unload()) or take them out (peft_model.unload()), "
    "and give the model that this returns"
)


def unwrap(model: Any) -> LanguageModel:
    """The causal language model itself, without ``torch.compile``, data parallelism, or an average of weights around it.

    Raises:
        ModelError: what is left is none of transformers, or has no head.
    """
    while isinstance(model, nn.Module) and (isinstance(model, _AROUND_MODULE) or _COMPILED in model._modules):
        model = model.module if isinstance(model, _AROUND_MODULE) else model._modules[_COMPILED]
    if _is_of_peft(model):
        raise ModelError(_MERGE)
    if _is_sharded(model):
        raise ModelError(_SHARDED)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or not isinstance(kind, str) or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"this is no causal language model of transformers: {type(model).__module__}.{type(model).__name__}")
    plain: Any = model
    if plain.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language model head; load it with AutoModelForCausalLM")
    return plain  # type: ignore[no-any-return]


_SHARDED = "the model is sharded (FSDP): its tensors are here in pieces only; edit it before it is sharded, or a whole copy of it"


def merge_adapters(model: LanguageModel) -> None:
    """Put adapters of peft that transformers loaded with a model into its own weights, and leave nothing of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    vars(model).pop("peft_config", None)
    vars(model)["_hf_peft_config_loaded"] = False


def require_whole(model: LanguageModel) -> None:
    """Refuse a model whose tensors are not its own, whole, and of numbers, or whose states nothing brings from device to device.

    Raises:
        ModelError: naming the first thing that is in the way, and the way out.
    """
    if getattr(model, "is_quantized", False):
        raise ModelError(_quantised("it", "is_quantized"))
    for name, module in model.named_modules():
        _require_plain_module(name, module)
    _require_plain_tensors(model.named_parameters(), is_spread=bool(getattr(model, "hf_device_map", None)))


def _require_plain_module(name: str, module: nn.Module) -> None:
    kind = type(module)
    if _COMPILED in module._modules:
        raise ModelError(
            f"{name} is wrapped in torch.compile, which gives its tensors other names; compile the whole model "
            "(torch.compile(model)), or its modules in place (module.compile())"
        )
    if _CHECKPOINTED in module._modules:
        raise ModelError(
            f"{name} is in a wrapper that computes activations again or keeps them elsewhere (checkpoint_wrapper), which gives its "
            "tensors other names; edit the model before it is wrapped, or use model.gradient_checkpointing_enable()"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{name or 'the model'} is a compiled script, which cannot be edited; give the model it was made from")
    if kind.__module__.startswith(_QUANTISED):
        raise ModelError(_quantised(name, f"{kind.__module__}.{kind.__name__}"))
    if _is_sharded(module):
        raise ModelError(_SHARDED)
    if _is_of_peft(module) and list(getattr(module, "lora_A", ())) != [FACTORS]:
        raise ModelError(_MERGE)


def _require_plain_tensors(parameters: Iterable[tuple[str, nn.Parameter]], is_spread: bool) -> None:
    """Of a model that accelerate spread over devices each may be elsewhere, as long as it is there all the time."""
    devices: dict[str, str] = {}
    for name, parameter in parameters:
        devices.setdefault(str(parameter.device), name)
        if not parameter.is_floating_point():
            raise ModelError(_quantised(name, str(parameter.dtype)))
        if hasattr(parameter, "placements"):
            raise ModelError(_SHARDED)
        if type(parameter.data) is not torch.Tensor:
            raise ModelError(_quantised(name, type(parameter.data).__name__))
        if parameter.is_inference():
            raise ModelError(
                f"{name} was made under torch.inference_mode, so nothing can be trained through it; load the model outside of that"
            )
    if "meta" in devices:
        raise ModelError(
            f"{devices['meta']} is on the device meta: it is not loaded, or accelerate keeps it elsewhere (offloading) and "
            "brings it only when it is needed; load the whole model on one device (device_map=None)"
        )
    if len(devices) > 1 and not is_spread:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ModelError(
            f"the model is spread over several devices ({where}); load it on one (device_map=None), or "
            "let transformers spread it (device_map='auto')"
        )


def _quantised(name: str, how: str) -> str:
    return (
        f"the model is quantised ({name}: {how}), and an edit is made of the numbers that it was before; load it without "
        "quantization_config, or take that off (model.dequantize())"
    )


def _is_of_peft(module: Any) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _is_sharded(module: Any) -> bool:
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(module).__mro__)
