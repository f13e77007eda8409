"""A change of weights as factors, at the price of its smaller singular values, and handed on as a LoRA in PEFT's format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Protocol, cast

import torch

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.low_rank import Factors, Pair
from propmeta_edit.models.artefacts import PEFT_PREFIX, build_whole
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.factors import as_adapter, lora_config, matrix_of, rank_of, write_adapter

_EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # of the supported architectures; PEFT keeps LoRAs of these in another form


def write_lora(
    changes: Mapping[str, torch.Tensor] | Factors,
    folder: Path,
    rank: int | None = None,
    tolerance: float | None = None,
    *,
    transposed: Collection[str] = (),
    base_model: str = "",
) -> float:
    """``approximate``, in PEFT's format; what hardly changes has no place in it.

    Args:
        folder: must not exist.
        transposed: those weights that are [in, out] (GPT-2's projections); PEFT turns them with ``fan_in_fan_out``.
        base_model: what the adapter says it belongs on.

    Returns:
        What that loses: the norm of all that is left out, biases and rounding included, over the norm of the change.

    Raises:
        ConfigError: as ``approximate``.
        ModelError: the folder exists; and as ``approximate``.
        OSError: the folder cannot be written.
    """
    _require_one(rank, tolerance)
    _require_new(folder)
    found, lost = approximate(changes, rank, tolerance, transposed=transposed)
    factors = {name: (a, b) for name, (a, b) in found.items() if len(a)}
    tensors = {named: value for name, (a, b) in factors.items() for named, value in _named_as_peft(name, a, b)}
    config = lora_config(
        {name.removesuffix(".weight"): len(a) for name, (a, _) in factors.items()},
        base_model,
        is_transposed=any(name in transposed for name in factors),
    )
    build_whole(folder, lambda partial: write_adapter(partial, tensors, config))
    return lost


def approximate(
    changes: Mapping[str, torch.Tensor] | Factors,
    rank: int | None = None,
    tolerance: float | None = None,
    *,
    transposed: Collection[str] = (),
) -> tuple[dict[str, Pair], float]:
    """Keep the largest singular values of the changes. Factors have no place for changes of biases: they are left out.

    Args:
        changes: by parameter name, as they are or as factors, of which no product is made.
        rank: of every matrix, 1 or more, in fp32.
        tolerance: in place of a rank, what may be lost: each matrix gets the rank that it needs, 0 if it hardly changes, in bf16
            where its rounding is within what may be lost, else in fp32.
        transposed: those weights that are [in, out].

    Returns:
        The factors of every matrix, and what they lose: the norm of all that is left out, biases and rounding included, over the
        norm of the change.

    Raises:
        ConfigError: a rank below 1, a tolerance that is not between 0 and 1, or not one of the two.
        ModelError: something changes that is neither a projection's matrix nor a bias, or the biases' changes alone are more than
            ``tolerance``.
    """
    _require_one(rank, tolerance)
    matrices = _choose_matrices(changes, transposed)
    biases = [change for name, change in changes.items() if name not in matrices]
    lost = fsum(float(in_double(cast(torch.Tensor, change)).square().sum()) for change in biases)  # whatever the order of names
    parts = {name: matrix.decompose() for name, matrix in matrices.items()}
    whole = lost + fsum(float(part.s.square().sum()) for part in parts.values())
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
    return factors, (missing / whole) ** 0.5 if whole else 0.0


@dataclass(frozen=True)
class _Parts:
    """A singular value decomposition, ``U diag(s) Vᴴ``, in double."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    def factorise(self, rank: int, dtype: torch.dtype) -> Pair:
        """(A [rank, in], B [out, rank]): B A is the closest matrix of that rank; rank that is not used is zero."""
        kept = min(rank, len(self.s))
        root = self.s[:kept].sqrt()
        a, b = self.s.new_zeros(rank, self.vh.shape[1]), self.s.new_zeros(self.u.shape[0], rank)
        a[:kept], b[:, :kept] = root[:, None] * self.vh[:kept], self.u[:, :kept] * root
        return a.to(dtype), b.to(dtype)


class _Matrix(Protocol):
    """A change [out, in]."""

    def decompose(self) -> _Parts: ...

    def squared_distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """To the product b a."""
        ...


@dataclass(frozen=True)
class _Dense:
    change: torch.Tensor

    def decompose(self) -> _Parts:
        return _Parts(*torch.linalg.svd(in_double(self.change), full_matrices=False))

    def squared_distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        return float((in_double(self.change) - in_double(b) @ in_double(a)).square().sum())


@dataclass(frozen=True)
class _Product:
    """``B A``: both are cut to their directions first (QR), so that nothing is larger than they are."""

    a: torch.Tensor
    b: torch.Tensor

    def decompose(self) -> _Parts:
        (left, core_left), (right, core_right) = torch.linalg.qr(in_double(self.b)), torch.linalg.qr(in_double(self.a).T)
        u, s, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        return _Parts(left @ u, s, vh @ right.T)

    def squared_distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        rows, columns = torch.cat([in_double(self.a), in_double(a)]), torch.cat([in_double(self.b), -in_double(b)], dim=1)
        return float((torch.linalg.qr(columns)[1] @ torch.linalg.qr(rows.T)[1].T).square().sum())


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
    return {name: ranks.get(name, 0) for name in parts}


def _squared_distance(matrices: Mapping[str, _Matrix], factors: Factors) -> float:
    return fsum(matrix.squared_distance(*factors[name]) for name, matrix in matrices.items())


def _named_as_peft(parameter: str, a: torch.Tensor, b: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    module = f"{PEFT_PREFIX}{parameter.removesuffix('.weight')}"
    return [(f"{module}.lora_A.weight", a.cpu().contiguous()), (f"{module}.lora_B.weight", b.cpu().contiguous())]


def pair_up(tensors: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """The factors in a LoRA's file, as ``write_lora`` wrote it, by parameter name."""
    modules = [name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{module}.weight": (tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"])
        for module in modules
    }


def write_exact_lora(factors: Factors, folder: Path, *, is_transposed: bool, base_model: str) -> None:
    """A change that is factors from the start, as they are.

    Args:
        factors: by parameter name.
        is_transposed: whether the projections' weights are [in, out].

    Raises:
        ModelError: the folder exists.
    """
    _require_new(folder)
    tensors = {named: value for name, (a, b) in factors.items() for named, value in _named_as_peft(name, a, b)}
    ranks = {name.removesuffix(".weight"): len(a) for name, (a, _) in factors.items()}
    config = lora_config(ranks, base_model, is_transposed)
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


def _choose_matrices(changes: Mapping[str, torch.Tensor] | Factors, transposed: Collection[str]) -> dict[str, _Matrix]:
    """The changes that factors can hold."""
    chosen = {name: change for name, change in changes.items() if _is_projection(name, change)}
    odd = [name for name in changes if name not in chosen and not name.endswith(".bias")]
    if odd or not chosen:
        raise ModelError(
            f"a LoRA holds changes of projections' matrices alone, and this edit moves {odd[0] if odd else 'none'}; keep the edit "
            "itself (save)"
        )
    if 0 < sum(name in transposed for name in chosen) < len(chosen):
        raise ModelError("a LoRA holds weights of one orientation, and this edit moves some of each; keep the edit itself (save)")
    return {name: _as_matrix(change, name in transposed) for name, change in chosen.items()}


def _is_projection(name: str, change: torch.Tensor | Pair) -> bool:
    is_matrix = isinstance(change, tuple) or change.dim() == 2
    return is_matrix and name.endswith(".weight") and name.split(".")[-2] not in _EMBEDDINGS


def _as_matrix(change: torch.Tensor | Pair, is_transposed: bool) -> _Matrix:
    if isinstance(change, tuple):
        return _Product(*change)
    return _Dense(change.T if is_transposed else change)
