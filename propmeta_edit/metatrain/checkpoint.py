"""The meta-tuned checkpoint: an ordinary model folder with ``metaft.json`` and a model card beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from propmeta_edit.edits.edit import find_transposed
from propmeta_edit.edits.lora import pair_up, write_lora
from propmeta_edit.errors import ModelError
from propmeta_edit.files import sha256_of_file
from propmeta_edit.finetune.low_rank import LowRankWeights
from propmeta_edit.metatrain.model_card import make_model_card
from propmeta_edit.metatrain.run import Progress
from propmeta_edit.models.artefacts import ADAPTER, CHECKPOINT_CARD, build_whole, holds_factors, resolve_model_folder
from propmeta_edit.models.factors import write_factors
from propmeta_edit.models.layers import factored_modules
from propmeta_edit.models.loading import (
    DTYPES,
    load_model,
    model_sha256,
    read_checkpoint_card,
    read_tensors,
    require_trained_from,
    save_model,
)
from propmeta_edit.protocols import LanguageModel, Tokenizer

PROGRESS = "progress.json"  # losses and validation, task by task
TRAINED, TRAINED_SHA256 = "trained.safetensors", "trained_sha256"  # of a compact folder, and in its card
CHANGE = "adapter"  # in its place, the change to the base as a LoRA of PEFT's, in a folder of its own


def save_checkpoint(folder: Path, model: LanguageModel, tokenizer: Tokenizer, card: Mapping[str, Any], progress: Progress) -> None:
    """Write weights (each tensor in the dtype it has), tokenizer, ``metaft.json``, ``progress.json`` and the model card.

    Of a model with factors these alone are written, as a LoRA on its base.

    Call it on a temporary folder that is renamed when whole (``models.artefacts.build_whole``).

    Args:
        card: at least ``base_model``, ``trained_tensors`` and ``settings``.

    Raises:
        ModelError: they cannot be written, or the trained tensors in the files are not the model's.
    """
    if factored_modules(model):
        write_factors(model, folder, card["base_model"])
        tokenizer.save_pretrained(folder)
    else:
        save_model(model, tokenizer, folder, card["trained_tensors"])
    full_card = {**card, "model_sha256": model_sha256(folder)}
    (folder / CHECKPOINT_CARD).write_text(json.dumps(full_card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PROGRESS).write_text(progress.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(make_model_card(full_card, progress.validation), encoding="utf-8")


def export_checkpoint(source: str, destination: Path, dtype: str) -> dict[str, float]:
    """Write a checkpoint in another dtype, for storage or serving, and say what the rounding costs.

    Returns:
        ``max_abs_error`` over the trained tensors and ``relative_error`` (norm of the rounding over norm of the tensors).

    Raises:
        ModelError: unknown dtype, or ``destination`` exists.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if destination.exists():
        raise ModelError(f"{destination} exists; choose another folder")
    folder = Path(resolve_model_folder(source))
    card = read_checkpoint_card(folder)
    model, tokenizer = load_model(str(folder), dtype=dtype)  # the trained tensors are fp32 in it
    trained = {name: p.detach() for name, p in model.named_parameters() if name in set(card["trained_tensors"])}
    model.to(DTYPES[dtype])  # gives its parameters other tensors and leaves those in ``trained`` alone
    cost = _rounding_cost(trained, dict(model.named_parameters()))

    def build(partial: Path) -> None:
        more = {"exported_dtype": dtype, "rounding": cost}
        save_checkpoint(partial, model, tokenizer, {**card, **more}, read_progress(folder))

    build_whole(destination, build)
    return cost


def export_compact(source: str, destination: Path) -> int:
    """Write what meta-training moved and nothing else, in a new folder: what one uploads. Returns its bytes of tensors.

    Beside ``TRAINED`` there are the card, with the base and its hash, the losses and the model card.

    Raises:
        ModelError: no meta-tuned checkpoint, one that lacks trained tensors, or ``destination`` exists.
    """

    def write(trained: dict[str, torch.Tensor], card: Mapping[str, Any], folder: Path, file: Path) -> dict[str, Any]:
        save_file(trained, file)
        return {}

    return _export_part(source, destination, TRAINED, write)


def export_as_lora(source: str, destination: Path, tolerance: float) -> tuple[int, float]:
    """The same with a LoRA on the base in ``TRAINED``'s place, in the folder ``CHANGE``, which PEFT loads by itself too.

    Args:
        tolerance: the share of the change's norm that the LoRA may lose, between 0 and 1.

    Returns:
        Its bytes of tensors, and what it loses.

    Raises:
        ConfigError: a tolerance that is none.
        ModelError: as ``export_compact``, or trained tensors that a LoRA cannot hold.
        OriginError: a base with other weights.
    """

    def write(trained: Mapping[str, torch.Tensor], card: Mapping[str, Any], folder: Path, file: Path) -> dict[str, Any]:
        return {"tolerance": tolerance, "lost": _write_change(trained, card, folder, file.parent, tolerance)}

    size = _export_part(source, destination, f"{CHANGE}/{ADAPTER}", write)
    return size, read_checkpoint_card(destination)["lost"]


def _export_part(
    source: str,
    destination: Path,
    file: str,
    write: Callable[[dict[str, torch.Tensor], dict[str, Any], Path, Path], dict[str, Any]],
) -> int:
    """A new folder with a card that knows one file of tensors, which ``write`` makes of the trained ones; their bytes.

    Args:
        write: also given the checkpoint's card and folder; returns what the new card says besides.
    """
    if destination.exists():
        raise ModelError(f"{destination} exists; choose another folder")
    folder = Path(resolve_model_folder(source))
    card = read_checkpoint_card(folder)
    if holds_factors(folder):
        raise ModelError(f"{source} holds its factors alone, without the base: it is compact as it is; push or copy that folder")
    trained = {name: value.float() for name, value in read_tensors(folder, set(card["trained_tensors"])).items()}

    def build(partial: Path) -> None:
        more = write(trained, card, folder, partial / file)
        compact_card = {**card, **more, TRAINED_SHA256: sha256_of_file(partial / file)}
        (partial / CHECKPOINT_CARD).write_text(json.dumps(compact_card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        progress = read_progress(folder)
        (partial / PROGRESS).write_text(progress.to_json() + "\n", encoding="utf-8")
        (partial / "README.md").write_text(make_model_card(compact_card, progress.validation, is_compact=True), encoding="utf-8")

    build_whole(destination, build)
    return sum(value.nbytes for value in load_file(destination / file).values())


def _write_change(
    trained: Mapping[str, torch.Tensor], card: Mapping[str, Any], folder: Path, destination: Path, tolerance: float
) -> float:
    """The difference of trained tensors from their base as a LoRA; what it loses (``edits.lora``)."""
    base = card["base_model"]
    model = _load_base(folder, base, f"put the base of {folder} where its card says")[0]
    before = {name: p.detach() for name, p in model.named_parameters() if name in trained}
    changes = {name: value - before[name] for name, value in trained.items()}
    return write_lora(changes, destination, tolerance=tolerance, transposed=find_transposed(model, changes), base_model=base)


def _load_base(checkpoint: Path, base: str, remedy: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model that a checkpoint was meta-trained from, the trained tensors in fp32; its tokenizer; the checkpoint's card."""
    base_folder = resolve_model_folder(base)
    card = require_trained_from(checkpoint, base, model_sha256(base_folder), remedy)
    chosen = {name: card["settings"][name] for name in ("layers", "modules")}
    return *load_model(base_folder, dtype="auto", **chosen), card


def put_checkpoint_together(source: Path, folder: Path, base: str) -> None:
    """The whole checkpoint again, from its compact folder and its base; the same bits as before, or as near as its tolerance says.

    Args:
        source: what ``export_compact`` wrote.
        folder: written to; use ``models.artefacts.build_whole`` around it.
        base: where the base is to be had.

    Raises:
        ModelError: no compact folder, or one that was changed.
        OriginError: a base with other weights.
    """
    model, tokenizer, card = _load_base(source, base, "name the right one with propmeta-edit expand ... --base")
    parameters = dict(model.named_parameters())
    trained = _read_trained(source, card, model)
    if set(trained) != set(card["trained_tensors"]) or not set(trained) <= set(parameters):
        raise ModelError(f"{source / TRAINED} does not hold the tensors its card names; export it again")
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].data = value
    expected = card.pop(TRAINED_SHA256, None)
    save_checkpoint(folder, model, tokenizer, card, read_progress(source))
    if expected is None and read_checkpoint_card(folder)["model_sha256"] != card["model_sha256"]:
        raise ModelError(f"{source} and its base do not give the checkpoint it was exported from; export it again")


def _read_trained(source: Path, card: Mapping[str, Any], base: Any) -> dict[str, torch.Tensor]:
    """The trained tensors of a compact folder: as they are there, or the base's with the change to them."""
    if not (source / CHANGE).is_dir():
        return _read_compact(source, TRAINED, card)
    parameters = dict(base.named_parameters())
    trained = {name: parameters[name].detach() for name in card["trained_tensors"] if name in parameters}
    factors = pair_up(_read_compact(source, f"{CHANGE}/{ADAPTER}", card))
    if not set(factors) <= set(trained):
        raise ModelError(f"{source / CHANGE} changes other tensors than its card names; export it again")
    return {**trained, **LowRankWeights(factors, find_transposed(base, factors), torch.float32).on(trained)}


def _read_compact(source: Path, file: str, card: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = source / file
    try:
        if card.get(TRAINED_SHA256) not in (None, sha256_of_file(path)):
            raise ValueError("another sha256 than its card says")
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} is missing or damaged ({error}); it is what propmeta-edit export --compact writes") from error


def read_progress(folder: Path) -> Progress:
    """Losses and validation of the run that a checkpoint, whole or compact, is from."""
    return Progress.from_json((folder / PROGRESS).read_text(encoding="utf-8"))


def _rounding_cost(exact: Mapping[str, torch.Tensor], rounded: Mapping[str, torch.Tensor]) -> dict[str, float]:
    errors = [(rounded[name].detach().float() - value.float()).flatten() for name, value in exact.items()]
    error, value = torch.cat(errors), torch.cat([v.float().flatten() for v in exact.values()])
    return {"max_abs_error": float(error.abs().max()), "relative_error": float(error.norm() / value.norm())}
