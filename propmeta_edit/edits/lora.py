"""A change of weights handed on as a LoRA in PEFT's format, at the price of its smaller singular values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.models.artefacts import PEFT_PREFIX, build_whole
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.factors import as_adapter, lora_config, matrix_of, rank_of, write_adapter

_EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # of the supported architectures; PEFT keeps LoRAs of these in another form


def write_lora(
    changes: Mapping[str, torch.Tensor],
    folder: Path,
    rank: int | None = None,
    tolerance: float | None = None,
    *,
    transposed: Collection[str] = (),
    base_model: str = "",
) -> float:
    """Keep the largest singular values of the changes. A LoRA has no place for changes of biases: they are left out.

    Args:
        changes: by parameter name.
        folder: must not exist.
        rank: of every matrix, 1 or more, in fp32.
        tolerance: in place of a rank, what may be lost: each matrix gets the rank that it needs, none if it hardly changes, in bf16
            where its rounding is within what may be lost, else in fp32.
        transposed: those weights that are [in, out] (GPT-2's projections); PEFT turns them with ``fan_in_fan_out``.
        base_model: what the adapter says it belongs on.

    Returns:
        What that loses: the norm of all that is left out, biases and rounding included, over the norm of the change.

    Raises:
        ConfigError: a rank below 1, a tolerance that is not between 0 and 1, or not one of the two.
        ModelError: the folder exists, something changes that is neither a projection's matrix nor a bias, or the biases' changes
            alone are more than ``tolerance``.
        OSError: the folder cannot be written.
    """
    _require_one(rank, tolerance)
    _require_new(folder)
    matrices = _choose_matrices(changes, transposed)
    whole = sum(float(in_double(change).square().sum()) for change in changes.values())
    lost = sum(float(in_double(change).square().sum()) for name, change in changes.items() if name not in matrices)  # of biases
    parts = {name: _Parts(*torch.linalg.svd(in_double(change), full_matrices=False)) for name, change in matrices.items()}
    if tolerance is None:
        factors = {name: part.factorise(cast(int, rank), torch.float32) for name, part in parts.items()}
        missing = lost + _squared_distance(matrices, factors)
    else:
        ranks = _ranks_within(parts, lost, tolerance**2 * whole)
        for dtype in (torch.bfloat16, torch.float32):
            factors = {name: parts[name].factorise(kept, dtype) for name, kept in ranks.items()}
            missing = lost + _squared_distance(matrices, factors)
            if missing <= tolerance**2 * whole:
                break
    tensors = {named: value for name, (a, b) in factors.items() for named, value in _named_as_peft(name, a, b)}
    config = lora_config(
        {name.removesuffix(".weight"): len(a) for name, (a, _) in factors.items()},
        base_model,
        is_transposed=any(name in transposed for name in factors),
    )
    build_whole(folder, lambda partial: write_adapter(partial, tensors, config))
    return (missing / whole) ** 0.5 if whole else 0.0


@dataclass(frozen=True)
class _Parts:
    """A singular value decomposition, ``U diag(s) Vᴴ``, in double."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    def factorise(self, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [rank, in], B [out, rank]): B A is the closest matrix of that rank; rank that is not used is zero."""
        kept = min(rank, len(self.s))
        root = self.s[:kept].sqrt()
        a, b = self.s.new_zeros(rank, self.vh.shape[1]), self.s.new_zeros(self.u.shape[0], rank)
        a[:kept], b[:, :kept] = root[:, None] * self.vh[:kept], self.u[:, :kept] * root
        return a.to(dtype), b.to(dtype)


def _require_one(rank: int | None, tolerance: float | None) -> None:
    if (rank is None) == (tolerance is None):
        raise ConfigError("a LoRA needs a rank or a tolerance, one of the two")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"the rank of a LoRA must be a whole number, 1 or more, got {rank!r}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError(f"the tolerance of a LoRA is a share of the change's norm, between 0 and 1, got {tolerance!r}")


def _ranks_within(parts: Mapping[str, _Parts], lost: float, most: float) -> dict[str, int]:
    """How many singular values each matrix keeps so that no more is lost: the largest of all matrices first; at least one of one.

    Args:
        lost, most: squared norms, lost already and allowed in all.
    """
    if lost > most:
        raise ModelError(
            "the changes of biases, which a LoRA cannot hold, are more than the tolerance; keep the edit itself (save)"
        )
    values = sorted(((float(s) ** 2, name) for name, part in parts.items() for s in part.s), reverse=True)
    left = lost + sum(value for value, _ in values)
    ranks: dict[str, int] = {}
    for value, name in values:
        if left <= most and ranks:
            break
        ranks[name], left = ranks.get(name, 0) + 1, left - value
    return {name: ranks[name] for name in parts if name in ranks}


def _squared_distance(changes: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of the changes to the factors' products; what has no factors is all missing."""
    missing = 0.0
    for name, change in changes.items():
        product = in_double(factors[name][1]) @ in_double(factors[name][0]) if name in factors else 0.0
        missing += float((in_double(change) - product).square().sum())
    return missing


def _named_as_peft(parameter: str, a: torch.Tensor, b: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    module = f"{PEFT_PREFIX}{parameter.removesuffix('.weight')}"
    return [(f"{module}.lora_A.weight", a.cpu().contiguous()), (f"{module}.lora_B.weight", b.cpu().contiguous())]


def write_exact_lora(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], folder: Path, *, is_transposed: bool, base_model: str
) -> None:
    """A change that is factors from the start, as they are.

    Args:
        factors: by projection (A [r, in], B [out, r]).
        is_transposed: whether the projections' weights are [in, out].

    Raises:
        ModelError: the folder exists.
    """
    _require_new(folder)
    tensors = {named: value for name, (a, b) in factors.items() for named, value in _named_as_peft(name, a, b)}
    config = lora_config({name: len(a) for name, (a, _) in factors.items()}, base_model, is_transposed)
    build_whole(folder, lambda partial: write_adapter(partial, tensors, config))


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
    config = lora_config(dict.fromkeys(modules, rank_of(factors)), base_model, is_transposed)
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
