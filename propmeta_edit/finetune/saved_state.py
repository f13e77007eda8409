"""What a stopped training continues from: trained tensors, AdamW's moments and a text, in files that show if they are damaged."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.files import written_whole
from propmeta_edit.finetune.weights import apply_snapshot

LOG = logging.getLogger(__name__)
_THETA = "theta."
STATE, PREVIOUS_STATE = "state.safetensors", "state.previous.safetensors"
_KEPT_OF_ADAMW = ("exp_avg", "exp_avg_sq", "step")
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors' headers


def save_state(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, text: str) -> None:
    """Write the state as it stands: ``write_state`` of ``take_state``."""
    write_state(folder, take_state(parameters, optimizer), text)


def take_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy on the host of the trained tensors and of AdamW's two moments, as they stand: three times the trained tensors."""
    tensors = take_tensors(parameters)
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": _copy_to_host(moments[key]) for key in _KEPT_OF_ADAMW if key in moments}
    return tensors


def take_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The part of ``take_state`` that is the trained tensors."""
    return {f"{_THETA}{name}": _copy_to_host(parameter.detach()) for name, parameter in parameters.items()}


def tensors_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained tensors of what ``take_state`` gave, by their own names."""
    return {key.removeprefix(_THETA): value for key, value in state.items() if key.startswith(_THETA)}


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def write_state(folder: Path, state: Mapping[str, torch.Tensor], text: str) -> None:
    """Write a state into ``folder``; the one before is kept, and stays alone until the new one is whole.

    Args:
        state: what ``take_state`` gave; nothing of it is copied again.
        text: how far the training is, and whatever else it needs to go on.

    Raises:
        ModelError: it cannot be written, for instance because the disk is full.
    """
    with written_whole(folder / STATE) as file:
        _save_tensors(state, file, text)
        if (folder / STATE).is_file():
            (folder / STATE).replace(folder / PREVIOUS_STATE)


def load_state(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> str | None:
    """Put the last good state into ``parameters`` and ``optimizer``; returns its text, None where there is no state.

    Raises:
        ModelError: a state of other tensors; nothing has been changed then.
    """
    for file in (folder / STATE, folder / PREVIOUS_STATE):
        if not file.is_file():
            continue
        try:
            tensors, text = read_tensors_with_text(file)
        except (SafetensorError, ValueError) as error:
            LOG.warning("%s is damaged (%s); trying the state before it", file, error)
            continue
        values = {name: value for name, value in tensors_of(tensors).items() if name in parameters}
        for name, parameter in parameters.items():
            if name not in values or values[name].shape != parameter.shape:
                wrong = f"{name} is missing or of another shape"
                raise ModelError(f"{file} is of a training of other tensors ({wrong}); remove {folder}")
        apply_snapshot(parameters, values)
        moments = {
            number: {key: tensors[f"{key}.{name}"] for key in _KEPT_OF_ADAMW}
            for number, name in enumerate(parameters)
            if f"step.{name}" in tensors
        }
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        LOG.info("continuing from %s", file)
        return text
    return None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file of tensors with their checksum, whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    with written_whole(path) as file:
        _save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file, "")


def read_tensors_with_text(file: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What ``save_state`` or ``write_tensors`` wrote.

    Raises:
        OSError, SafetensorError: no such file, or one that is cut off.
        ValueError: its contents are not those that were written.
    """
    with safe_open(str(file), framework="pt") as reader:  # type: ignore[no-untyped-call]
        tensors, metadata = {key: reader.get_tensor(key) for key in reader.keys()}, reader.metadata() or {}  # noqa: SIM118
    text = metadata.get("progress", "")
    if metadata.get("sha256") != _checksum(tensors, text):
        raise ValueError("its checksum does not fit its contents")
    return tensors, text


def _save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, text: str) -> None:
    try:
        save_file(dict(tensors), file, {"progress": text, "sha256": _checksum(tensors, text)})
    except (OSError, SafetensorError) as error:  # the second is what a full disk becomes inside safetensors
        raise ModelError(f"cannot write {file.parent}: {error}; what was saved before is still there") from error


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """Of the text, and of each tensor as a safetensors file of its own would have it: read in place, not copied."""
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        digest.update(_header(name, tensors[name]))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header(name: str, tensor: torch.Tensor) -> bytes:
    entry = {"dtype": _NAMES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    text = json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
