"""What holds the difference from a base alone, a compact checkpoint or an edit, put together with it: a whole model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from propmeta_edit.edits.edit import Edit
from propmeta_edit.edits.saved import CONFIG
from propmeta_edit.errors import ModelError
from propmeta_edit.metatrain.checkpoint import put_checkpoint_together, read_progress, save_checkpoint
from propmeta_edit.models.artefacts import CHECKPOINT_CARD, build_whole, holds_adapter, resolve_model_folder
from propmeta_edit.models.loading import keep_in_fp32, load_model, read_checkpoint_card, save_model


def expand_folder(source: Path, destination: Path, base: str | None = None) -> None:
    """``put_together`` in a new folder.

    Raises:
        ModelError: ``destination`` exists; and as ``put_together``.
        OriginError: as ``put_together``.
    """
    if destination.exists():
        raise ModelError(f"{destination} exists; choose another folder")
    build_whole(destination, lambda partial: put_together(source, partial, base))


def put_together(source: Path, folder: Path, base: str | None = None) -> None:
    """The whole model that a compact checkpoint or an edit is with its base, in an empty folder.

    Args:
        base: the base model if it is to be had elsewhere than the difference says.

    Raises:
        ModelError: no such folder, a damaged one, or a base that is not to be had; an edit that was made on other weights.
        OriginError: a checkpoint from other weights.
    """
    edit = Edit.load(source) if (source / CONFIG).is_file() else None
    named = str(read_checkpoint_card(source)["base_model"]) if edit is None else edit.base_model
    try:
        resolve_model_folder(base or named)
    except ModelError as error:
        raise ModelError(
            f"{source} holds the difference from {base or named!r} alone, which is not to be had ({error}); say where it is: "
            f"propmeta-edit expand {source} --base BASE --output FOLDER"
        ) from error
    if edit is None:
        put_checkpoint_together(source, folder, base or named)
    else:
        _put_edit_together(source, edit, folder, base or named)


def _put_edit_together(source: Path, edit: Edit, folder: Path, base: str) -> None:
    """The edited tensors in the dtype that they have in the edit, the others as they are stored."""
    base_folder = resolve_model_folder(base)
    model, tokenizer = _load_for(edit, base_folder)
    edit.apply(model)
    if (Path(base_folder) / CHECKPOINT_CARD).is_file():
        card = read_checkpoint_card(base_folder)
        moved = [*card["trained_tensors"], *(name for name in edit.weights if name not in card["trained_tensors"])]
        save_checkpoint(folder, model, tokenizer, {**card, "trained_tensors": moved}, read_progress(Path(base_folder)))
    else:
        save_model(model, tokenizer, folder, edit.weights)
    shutil.copyfile(source / CONFIG, folder / CONFIG)


def _load_for(edit: Edit, base_folder: str) -> tuple[Any, Any]:
    """The base with the tensors that an edit moves as they were when it was made."""
    dtypes = set(edit.dtypes.values())
    if holds_adapter(base_folder):  # whose folder has no tensors to be read in fp32 beside a rest in half precision
        return load_model(base_folder, dtype=str(max(dtypes, key=lambda one: one.itemsize)).removeprefix("torch."), layers=[])
    model, tokenizer = load_model(base_folder, dtype="auto", layers=[])
    parameters = dict(model.named_parameters())
    rounded = [n for n, dtype in edit.dtypes.items() if n in parameters and parameters[n].dtype.itemsize < dtype.itemsize]
    keep_in_fp32(model, base_folder, rounded)
    with torch.no_grad():
        for name, dtype in edit.dtypes.items():
            if name in parameters and name not in rounded:
                parameters[name].data = parameters[name].data.to(dtype)
    return model, tokenizer
