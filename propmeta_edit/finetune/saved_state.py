"""What a stopped training continues from: trained tensors, AdamW's moments and a text, in files that show if they are damaged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.files import written_whole
from propmeta_edit.finetune.weights import apply_snapshot

LOG = logging.getLogger(__name__)
STATE, PREVIOUS_STATE = "state.safetensors", "state.previous.safetensors"
_KEPT_OF_ADAMW = ("exp_avg", "exp_avg_sq", "step")


def save_state(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, text: str) -> None:
    """Write the state into ``folder``; the one before is kept, and stays alone until the new one is whole.

    Args:
        text: how far the training is, and whatever else it needs to go on.

    Raises:
        ModelError: it cannot be written, for instance because the disk is full.
    """
    tensors = {f"theta.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": moments[key].contiguous() for key in _KEPT_OF_ADAMW if key in moments}
    with written_whole(folder / STATE) as file:
        _save_tensors(tensors, file, text)
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
        values = {name: tensors[f"theta.{name}"] for name in parameters if f"theta.{name}" in tensors}
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
        _save_tensors({name: value.detach().contiguous() for name, value in tensors.items()}, file, "")


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


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path, text: str) -> None:
    try:
        save_file(tensors, file, {"progress": text, "sha256": _checksum(tensors, text)})
    except SafetensorError as error:  # what a full disk becomes inside safetensors
        raise ModelError(f"cannot write {file.parent}: {error}; what was saved before is still there") from error


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        digest.update(save({name: tensors[name]}))
    return digest.hexdigest()
