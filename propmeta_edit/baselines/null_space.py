"""AlphaEdit's projections on the null space of the keys to be kept, and its update of one layer.

Notation as in EasyEdit: keys K [in, n], residuals R [out, n], the weight's change ΔW [out, in].
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from propmeta_edit.baselines.second_moments import read_second_moment
from propmeta_edit.errors import ModelError
from propmeta_edit.files import sha256_of_file, written_whole
from propmeta_edit.models.devices import place_of_doubles


def compute_projection(second_moment: torch.Tensor, threshold: float) -> torch.Tensor:
    """``P = U₀U₀ᵀ``, U₀ the eigenvectors of ``C`` with eigenvalue below ``threshold`` (an absolute value), [in, in] in fp32.

    ``C`` is symmetric and positive, so its eigenvalues are the singular values that AlphaEdit's description speaks of.
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    null: torch.Tensor = vectors[:, values < threshold]
    projection: torch.Tensor = (null @ null.T).float()
    return projection


def solve_update(
    keys: torch.Tensor, residuals: torch.Tensor, projection: torch.Tensor, kept: torch.Tensor, l2: float
) -> torch.Tensor:
    """``ΔW`` [out, in] with ``ΔWᵀ = (P (K Kᵀ + S) + L2·I)⁻¹ P K Rᵀ``, S the sum of ``K Kᵀ`` over earlier edits of the same chain.

    With A the keys of this edit and of those side by side, S + K Kᵀ = A Aᵀ and ``(P A Aᵀ + L2·I)⁻¹ P A = P A (Aᵀ P A + L2·I)⁻¹``:
    a system as wide as there are keys, not as the layer.

    Args:
        keys: K, [in, n].
        residuals: R, [out, n], this layer's share.
        projection: P, [in, in].
        kept: the keys of the earlier edits, [in, m].
        l2: the weight of the update's own size.
    """
    every = torch.cat([keys, kept], dim=1)
    projected = projection @ every
    system = every.T @ projected + l2 * torch.eye(every.shape[1], dtype=every.dtype, device=every.device)
    shares = torch.cat([residuals, residuals.new_zeros(len(residuals), kept.shape[1])], dim=1)
    transposed: torch.Tensor = projected @ torch.linalg.solve(system, shares.T)
    return transposed.T


def load_projection(statistics: Path, threshold: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The projection for a file of second moments, kept on the device once it was read.

    Raises:
        ModelError: as ``read_projection``.
    """
    return _load_projection(statistics, stamp_of(statistics), threshold, str(device))


@lru_cache(maxsize=16)  # a model's layers; the stamp tells a file that was written anew
def _load_projection(statistics: Path, stamp: int, threshold: float, device: str) -> torch.Tensor:
    return read_projection(statistics, threshold, device).to(device)


def stamp_of(statistics: Path) -> int:
    """When the file was written, for whoever keeps what was made of it; 0 if there is none."""
    return statistics.stat().st_mtime_ns if statistics.is_file() else 0


def read_projection(statistics: Path, threshold: float, device: str = "cpu") -> torch.Tensor:
    """The projection for a file of second moments, computed once and kept beside it (it is of that file's bytes), on the CPU.

    Args:
        device: where it is computed, if it has to be.

    Raises:
        ModelError: the statistics are missing, or no eigenvalue is below the threshold, so that nothing could be written.
    """
    ensure_projection(statistics, threshold, device)
    with safe_open(str(projection_file(statistics, threshold)), framework="pt") as reader:  # type: ignore[no-untyped-call]
        projection: torch.Tensor = reader.get_tensor("projection")
    return projection


def projection_file(statistics: Path, threshold: float) -> Path:
    """Where the projection for a file of second moments is kept."""
    return statistics.with_name(f"{statistics.stem}_null_space_{threshold:g}.safetensors")


def ensure_projection(statistics: Path, threshold: float, device: str = "cpu") -> float:
    """Compute and write the projection unless it is there already; returns the seconds that took, then or now.

    Args:
        device: where it is computed; on the CPU in place of MPS, which has no float64.

    Raises:
        ModelError: as ``read_projection``.
    """
    kept = projection_file(statistics, threshold)
    digest = sha256_of_file(statistics) if statistics.is_file() else ""
    if kept.is_file():
        with safe_open(str(kept), framework="pt") as reader:  # type: ignore[no-untyped-call]
            card = reader.metadata()
        if card["statistics_sha256"] == digest:
            return float(card["seconds"])
    started = time.perf_counter()
    moment = read_second_moment(statistics).to(place_of_doubles(device))
    projection = compute_projection(moment, threshold).cpu()
    if not projection.any():
        raise ModelError(f"no eigenvalue of {statistics} is below nullspace_threshold {threshold}; raise it")
    seconds = time.perf_counter() - started
    with written_whole(kept) as temporary:
        save_file({"projection": projection}, temporary, {"statistics_sha256": digest, "seconds": f"{seconds:.2f}"})
    return seconds
