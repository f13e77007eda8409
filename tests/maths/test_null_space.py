"""AlphaEdit's projection and update against their defining properties and the paper's transposed form."""

from __future__ import annotations

import numpy
import pytest
import torch

from propmeta_edit.baselines.null_space import compute_projection, ensure_projection, load_projection, solve_update
from propmeta_edit.baselines.second_moments import SecondMoments, write_statistics
from propmeta_edit.errors import ModelError

WIDTH, OUT = 8, 5


@pytest.fixture
def kept_keys():
    """Keys in three of eight dimensions, so that five are free."""
    torch.manual_seed(0)
    return torch.randn(WIDTH, 3) @ torch.randn(3, 40)


def second_moment(keys):
    return keys @ keys.T / keys.shape[1]


def test_projection_is_orthogonal_and_kills_the_kept_keys(kept_keys):
    projection = compute_projection(second_moment(kept_keys), 2e-2)
    torch.testing.assert_close(projection, projection.T)
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-5, atol=1e-5)
    assert round(projection.trace().item()) == WIDTH - 3
    assert (projection @ kept_keys).abs().max() < 1e-4


def test_projection_agrees_with_the_singular_vectors_of_the_definition(kept_keys):
    moment = second_moment(kept_keys + 0.3 * torch.randn_like(kept_keys))
    vectors, values, _ = torch.linalg.svd(moment)
    null = vectors[:, values < 0.1]
    assert 0 < null.shape[1] < WIDTH
    torch.testing.assert_close(compute_projection(moment, 0.1), null @ null.T, rtol=1e-4, atol=1e-5)


def test_update_keeps_old_keys_and_writes_new_ones(kept_keys):
    projection = compute_projection(second_moment(kept_keys), 2e-2)
    new, residuals = torch.randn(WIDTH, 2), torch.randn(OUT, 2)
    update = solve_update(new, residuals, projection, torch.zeros(WIDTH, 0), l2=1e-3)
    assert (update @ kept_keys).abs().max() < 1e-2
    torch.testing.assert_close(update @ new, residuals, rtol=2e-2, atol=2e-2)


def test_update_is_the_papers_transposed_form(kept_keys):
    """Δ P = R Kᵀ P (S P + K Kᵀ P + L2·I)⁻¹."""
    p = compute_projection(second_moment(kept_keys), 2e-2).double()
    k, r, old = (torch.randn(*shape, dtype=torch.float64) for shape in ((WIDTH, 2), (OUT, 2), (WIDTH, 4)))
    s = old @ old.T
    by_paper = r @ k.T @ p @ torch.linalg.inv(s @ p + k @ k.T @ p + 10 * torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(solve_update(k, r, p, old, l2=10), by_paper, rtol=1e-9, atol=1e-12)


def solve_densely(keys, residuals, projection, kept, l2):
    """The definition: a system as wide as the layer."""
    system = projection @ (keys @ keys.T + kept @ kept.T) + l2 * torch.eye(len(projection), dtype=projection.dtype)
    return torch.linalg.solve(system, projection @ keys @ residuals.T).T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-4)])
@pytest.mark.parametrize("num_kept", [0, 1, 30])
@pytest.mark.parametrize("num_new", [1, 4])
def test_update_by_a_small_system_is_that_of_the_dense_one(dtype, tolerance, num_new, num_kept):
    """At a width of which a third is free; keys of one length and of very different ones. Relative to the update's norm."""
    width = 96
    generator = torch.Generator().manual_seed(num_kept)
    some = torch.randn(width, 64, generator=generator, dtype=torch.float64)
    projection = compute_projection(some @ some.T / 64, 2e-2).to(dtype)
    sizes = torch.logspace(-1, 1, num_new + num_kept, dtype=torch.float64)
    every = (torch.randn(width, num_new + num_kept, generator=generator, dtype=torch.float64) * sizes).to(dtype)
    residuals = torch.randn(OUT, num_new, generator=generator, dtype=torch.float64).to(dtype)
    arguments = every[:, :num_new], residuals, projection, every[:, num_new:], 10.0
    update, dense = solve_update(*arguments), solve_densely(*arguments)
    assert dense.norm() > 0 and (update - dense).norm() <= tolerance * dense.norm()


def test_a_projection_is_computed_where_it_is_asked_for(kept_keys, tmp_path, monkeypatch):
    """A GPU takes seconds where a CPU takes minutes; MPS has no float64."""
    [file] = write_statistics(SecondMoments({"m": kept_keys @ kept_keys.T}, 40, 4), tmp_path, "model", "text")
    places = []

    class Moment:
        def to(self, place):
            places.append(place)
            return second_moment(kept_keys)

    monkeypatch.setattr("propmeta_edit.baselines.null_space.read_second_moment", lambda file: Moment())
    for threshold, device in ((0.01, "cuda:0"), (0.02, "mps"), (0.03, "cpu")):
        ensure_projection(file, threshold, device)
    assert places == ["cuda:0", "cpu", "cpu"]


def test_projection_is_kept_and_belongs_to_its_statistics(kept_keys, tmp_path):
    [file] = write_statistics(SecondMoments({"m": kept_keys @ kept_keys.T}, 40, 4), tmp_path, "model", "text")
    first = load_projection(file, 2e-2)
    [kept] = file.parent.glob("*null_space_0.02.safetensors")
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(load_projection(file, 2e-2), first) and kept.stat().st_mtime_ns == stamp
    other = torch.from_numpy(numpy.diag([1.0] * 7 + [0.0])).float()
    write_statistics(SecondMoments({"m": other}, 1, 4), tmp_path, "model", "text")
    assert load_projection(file, 2e-2).trace().round() == 1, "other statistics, another projection"


def test_a_threshold_that_leaves_nothing_is_refused(tmp_path):
    [file] = write_statistics(SecondMoments({"m": torch.eye(4)}, 1, 4), tmp_path, "model", "text")
    with pytest.raises(ModelError, match=r"nullspace_threshold 0\.02"):
        load_projection(file, 2e-2)
    with pytest.raises(ModelError, match="propmeta-edit statistics"):
        load_projection(tmp_path / "none.npz", 2e-2)
