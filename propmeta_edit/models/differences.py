"""Small files that turn one model into another: a LoRA, or the difference in a few tensors.

Both are applied so that every machine gets the same bits: bf16 factors are multiplied in float64, where their products and sums are
exact (up to an exponent range that trained factors do not reach), and everything else is done number by number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from propmeta_edit.errors import ModelError
from propmeta_edit.files import write_text_atomically, written_whole
from propmeta_edit.models.artefacts import ADAPTER, ADAPTER_CONFIG, PEFT_PREFIX
from propmeta_edit.protocols import LanguageModel

DIFFERENCE = "difference.safetensors"


def save_adapter(peft_model: Any, folder: Path) -> None:
    """A LoRA in PEFT's own format, rounded to bf16."""
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None  # PEFT writes where the base lay on this machine
    write_text_atomically(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / ADAPTER).items()}
    with written_whole(folder / ADAPTER) as file:
        save_file(tensors, file, metadata={"format": "pt"})


def merge_adapter(model: LanguageModel, folder: Path) -> None:
    """``W ← W + scale · B A`` in place, for every pair of factors in ``folder``.

    Args:
        model: in fp32.
        folder: as ``save_adapter`` writes it.

    Raises:
        ModelError: factors without a matching parameter.
    """
    tensors = load_file(folder / ADAPTER)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    parameters = dict(model.named_parameters())
    for key, factor_a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
        if name not in parameters:
            raise ModelError(f"{folder / ADAPTER} holds factors for {name}, which the model does not have")
        update = scale * (tensors[key.replace(".lora_A.", ".lora_B.")].double() @ factor_a.double())
        with torch.no_grad():
            parameters[name].copy_((parameters[name].double() + update).float())


def save_difference(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], folder: Path) -> None:
    """``tuned - base`` tensor by tensor, rounded to bf16 (relative to the difference, so little is lost)."""
    with written_whole(folder / DIFFERENCE) as file:
        save_file({name: (value - base[name]).to(torch.bfloat16).contiguous() for name, value in tuned.items()}, file)


def apply_difference(model: LanguageModel, folder: Path) -> list[str]:
    """Add a saved difference in place and return the names of the tensors it moved.

    Raises:
        ModelError: a tensor that the model does not have, or has in another shape.
    """
    parameters = dict(model.named_parameters())
    differences = load_file(folder / DIFFERENCE)
    for name, difference in differences.items():
        if name not in parameters or parameters[name].shape != difference.shape:
            raise ModelError(f"{folder / DIFFERENCE} holds {name} {tuple(difference.shape)}, which does not fit this model")
        with torch.no_grad():
            parameters[name].add_(difference.to(parameters[name].dtype))
    return list(differences)
