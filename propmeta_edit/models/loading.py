"""How a model is loaded: the edited tensors in fp32, the frozen rest in the dtype asked for.

Ten steps of 2e-5 are below the spacing of bf16 numbers near a weight of 0.02 and would mostly vanish, so the tensors that either
loop moves stay in fp32 through meta-training, editing, generation, saving and loading. ``metaft.json`` beside a meta-tuned
checkpoint names the tensors that meta-training moved; they are read in fp32 too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.files import sha256_of_file, sha256_of_json
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.layers import cast_around, get_architecture, select_parameters

LOG = logging.getLogger(__name__)
CHECKPOINT_CARD = "metaft.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    layers: Sequence[int] | str | None = None,
    modules: str = "attention+mlp",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model for editing or evaluation.

    Args:
        name_or_path: a folder, a bundled name, or a hub id.
        device: a torch device string.
        dtype: of the frozen rest: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint is stored in.
        layers, modules: what will be edited; these tensors are fp32 whatever ``dtype`` says.
        trust_remote_code: run code that comes with the model; off unless asked.

    Returns:
        (model in eval mode, tokenizer that pads on the left and has a pad token).

    Raises:
        ModelError: unknown name, unsupported architecture, weights that do not fit the architecture, unknown dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, auto, got {dtype!r}")
    folder = resolve_model_folder(name_or_path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load a model from {name_or_path!r}: {error}") from error
    _check_weights_fit(name_or_path, model, report)
    names = set(select_parameters(model, layers, modules)) | set(_trained_tensor_names(folder))
    if model.dtype != torch.float32:
        keep_in_fp32(model, folder, names)
    prepare_tokenizer(tokenizer)
    return model.to(device).eval(), tokenizer


def prepare_tokenizer(tokenizer: Any) -> None:
    """Give it a pad token if it has none, and pad on the left, so that texts end together."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def _check_weights_fit(name: str, model: Any, report: dict[str, Any]) -> None:
    get_architecture(model.config.model_type)
    wrong = {kind: sorted(map(str, report.get(kind) or ()))[:3] for kind in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ModelError(
            f"the weights in {name!r} are not those of its config.json (a {model.config.model_type} model of "
            f"{model.config.num_hidden_layers} layers): {wrong}; use a checkpoint of the same architecture"
        )


def _trained_tensor_names(folder: str) -> list[str]:
    card = Path(folder) / CHECKPOINT_CARD
    return list(json.loads(card.read_text())["trained_tensors"]) if card.is_file() else []


def keep_in_fp32(model: nn.Module, folder: str, names: Iterable[str]) -> None:
    """Put the named tensors of a half-precision model into fp32, with the values the checkpoint holds, and cast around them.

    Each tensor's fp32 values are read from the safetensors files where ``folder`` is local; a hub model in half precision has
    no more than what was loaded.
    """
    names = set(names)
    stored = _read_tensors(Path(folder), names) if Path(folder).is_dir() else {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            if name in names:
                values = stored.get(name, parameter.detach())
                setattr(module, leaf, nn.Parameter(values.float().to(parameter.device), requires_grad=parameter.requires_grad))
                cast_around(module)


def _read_tensors(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as reader:  # type: ignore[no-untyped-call]
            for name in names.intersection(reader.keys()):
                tensors[name] = reader.get_tensor(name)
    missing = names - tensors.keys()
    if missing:
        LOG.warning("%d edited tensors are not in %s by name and stay as loaded, e.g. %s", len(missing), folder, min(missing))
    return tensors


def model_sha256(folder: str | Path) -> str:
    """One hash over the safetensors files of a model folder, names and contents."""

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError(f"no safetensors files in {folder}")
    return sha256_of_json([[file.name, sha256_of_file(file)] for file in files])
