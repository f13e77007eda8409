"""Size, direction and rank of a change of weights, and the states that a meta-training run kept on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from propmeta_edit.errors import ModelError
from propmeta_edit.metatrain.run import read_kept_state
from propmeta_edit.models.devices import in_double

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MatrixChange:
    """What one matrix's change ΔW is like, with its singular values s₁ ≥ s₂ ≥ ...

    Attributes:
        norm: Frobenius norm of ΔW.
        relative_norm: that over the Frobenius norm of W before.
        top_share: s₁² / Σ s², 1 for a change of rank one.
        stable_rank: Σ s² / s₁².
        effective_rank: exp of the entropy of s / Σ s (Roy and Vetterli, 2007), r for r equal singular values.
    """

    norm: float
    relative_norm: float
    top_share: float
    stable_rank: float
    effective_rank: float


def describe_matrix(before: torch.Tensor, change: torch.Tensor) -> MatrixChange:
    """Of a matrix [out, in] or [in, out] and its change; a change of nothing has norm 0 and no rank (NaN).

    Raises:
        ModelError: not a matrix, or shapes that differ.
    """
    if change.dim() != 2 or before.shape != change.shape:
        raise ModelError(f"two matrices of one shape are needed, got {list(before.shape)} and its change {list(change.shape)}")
    singular = torch.linalg.svdvals(in_double(change))
    energy = singular.square()
    share = singular / singular.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    norm = energy.sum().sqrt()
    return MatrixChange(
        float(norm),
        float(norm / in_double(before).norm()),
        float(energy[0] / energy.sum()),
        float(energy.sum() / energy[0]),
        float(entropy.exp()),
    )


def describe_change(before: Tensors, change: Tensors) -> dict[str, dict[str, float]]:
    """``MatrixChange`` of every matrix by its projection's name (``q_proj``, ...), and the whole's norms under ``all``.

    Args:
        before, change: by parameter name, of one layer; biases count in ``all`` alone.
    """
    found = {_leaf(name): asdict(describe_matrix(before[name], value)) for name, value in change.items() if value.dim() == 2}
    norm = compute_norm(change)
    found["all"] = {"norm": norm, "relative_norm": norm / compute_norm({name: before[name] for name in change})}
    return found


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def compute_norm(tensors: Tensors) -> float:
    """Of all numbers together, as one vector."""
    return float(torch.stack([in_double(value).square().sum() for value in tensors.values()]).sum().sqrt())


def compute_cosine(first: Tensors, second: Tensors) -> float:
    """Of two changes as one vector each, in -1 to 1; NaN if one of them is nothing.

    Raises:
        ModelError: they are of different tensors.
    """
    if set(first) != set(second):
        differing = sorted(set(first) ^ set(second))
        raise ModelError(f"two changes of the same tensors are needed, and only one has {differing[0]}; compare edits of one layer")
    inner = sum(float((in_double(first[name]) * in_double(second[name])).sum()) for name in first)
    norms = compute_norm(first) * compute_norm(second)
    return inner / norms if norms else float("nan")


def mean_cosines(changes: Sequence[Tensors]) -> list[float]:
    """For each change the mean cosine with all the others: how much of it is not about its own fact.

    Raises:
        ModelError: fewer than two changes.
    """
    if len(changes) < 2:
        raise ModelError(f"cosines between changes need two or more of them, got {len(changes)}")
    pairs = torch.eye(len(changes), dtype=torch.float64)
    for row in range(len(changes)):
        for column in range(row):
            pairs[row, column] = pairs[column, row] = compute_cosine(changes[row], changes[column])
    return [float(value) for value in (pairs.sum(dim=1) - 1) / (len(changes) - 1)]


def load_kept_state(file: Path, like: Tensors) -> dict[str, torch.Tensor]:
    """The trained tensors of a kept state, in the dtype and on the device of the model's own.

    Raises:
        ModelError: a damaged file, or one of other tensors than ``like``.
    """
    state = read_kept_state(file)
    shapes, own = ({name: list(value.shape) for name, value in tensors.items()} for tensors in (state, like))
    if shapes != own:
        raise ModelError(
            f"{file} holds {_first_difference(shapes, own)}, the model's edited layer {_first_difference(own, shapes)}; "
            "give a run of this model and layer"
        )
    return {name: value.to(like[name]) for name, value in state.items()}


def _first_difference(own: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> str:
    return next((f"{name} {shape}" for name, shape in sorted(own.items()) if other.get(name) != shape), "nothing else")
