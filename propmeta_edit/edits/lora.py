"""A change of weights handed on as a LoRA in PEFT's format, at the price of its smaller singular values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.models.artefacts import build_whole
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.factors import as_adapter, lora_config, matrix_of, rank_of, write_adapter

_EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # of the supported architectures; PEFT keeps LoRAs of these in another form


def write_lora(
    changes: Mapping[str, torch.Tensor], folder: Path, rank: int, *, transposed: Collection[str] = (), base_model: str = ""
) -> float:
    """Keep the largest singular values of every matrix's change. A LoRA has no place for changes of biases: they are left out.

    Args:
        changes: by parameter name.
        folder: must not exist.
        rank: 1 or more.
        transposed: those weights that are [in, out] (GPT-2's projections); PEFT turns them with ``fan_in_fan_out``.
        base_model: what the adapter says it belongs on.

    Returns:
        What that loses: the norm of all that is left out, biases included, over the norm of the change.

    Raises:
        ConfigError: a rank below 1.
        ModelError: the folder exists, or something changes that is neither a projection's matrix nor a bias.
        OSError: the folder cannot be written.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"the rank of a LoRA must be a whole number, 1 or more, got {rank!r}")
    _require_new(folder)
    matrices = _choose_matrices(changes, transposed)
    tensors, lost = {}, sum(float(in_double(change).square().sum()) for name, change in changes.items() if name not in matrices)
    whole = lost
    for name, change in matrices.items():
        a, b, singular = _factorise(change, rank)
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
        lost, whole = lost + float(singular[rank:].square().sum()), whole + float(singular.square().sum())
    modules = [name.removesuffix(".weight") for name in matrices]
    config = lora_config(modules, rank, base_model, any(name in transposed for name in matrices))
    build_whole(folder, lambda partial: write_adapter(partial, tensors, config))
    return (lost / whole) ** 0.5 if whole else 0.0


def write_factors_as_lora(factors: Mapping[str, torch.Tensor], folder: Path, *, is_transposed: bool, base_model: str) -> None:
    """An edit of a model's factors (``models.factors``) as the LoRA that it is: on the base, with what the checkpoint changed.

    Args:
        factors: A and B of every edited projection, by parameter name.
        is_transposed: whether the projections' weights are [in, out].
        base_model: of the checkpoint.

    Raises:
        ModelError: the folder exists.
    """
    _require_new(folder)
    modules = sorted({matrix_of(name) for name in factors})
    config = lora_config(modules, rank_of(factors), base_model, is_transposed)
    build_whole(folder, lambda partial: write_adapter(partial, as_adapter(factors), config))


def _require_new(folder: Path) -> None:
    if folder.exists():
        raise ModelError(f"{folder} exists; choose another folder for the LoRA")


def _choose_matrices(changes: Mapping[str, torch.Tensor], transposed: Collection[str]) -> dict[str, torch.Tensor]:
    """The changes that a LoRA can hold, each [out, in]."""
    matrices = {
        name: value
        for name, value in changes.items()
        if value.dim() == 2 and name.endswith(".weight") and name.split(".")[-2] not in _EMBEDDINGS
    }
    odd = [name for name in changes if name not in matrices and not name.endswith(".bias")]
    if odd or not matrices:
        raise ModelError(
            f"a LoRA holds changes of projections' matrices alone, and this edit moves {odd[0] if odd else 'none'}; keep the edit "
            "itself (save)"
        )
    if 0 < sum(name in transposed for name in matrices) < len(matrices):
        raise ModelError("a LoRA holds weights of one orientation, and this edit moves some of each; keep the edit itself (save)")
    return {name: value.T if name in transposed else value for name, value in matrices.items()}


def _factorise(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A [rank, in], B [out, rank], all singular values): B A is the closest matrix of that rank; rank that is not used is zero."""
    u, s, vh = torch.linalg.svd(in_double(change), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
    a[:kept], b[:, :kept] = root[:, None] * vh[:kept], u[:, :kept] * root
    return a, b, s
