"""AlphaEdit's projection and update against their defining properties and the paper's transposed form."""

from __future__ import annotations

import numpy
import pytest
import torch

from propmeta_edit.baselines.null_space import compute_projection, load_projection, solve_update
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
    update = solve_update(new, residuals, projection, torch.zeros(WIDTH, WIDTH), l2=1e-3)
    assert (update @ kept_keys).abs().max() < 1e-2
    torch.testing.assert_close(update @ new, residuals, rtol=2e-2, atol=2e-2)


def test_update_is_the_papers_transposed_form(kept_keys):
    """Δ P = R Kᵀ P (S P + K Kᵀ P + L2·I)⁻¹."""
    p = compute_projection(second_moment(kept_keys), 2e-2).double()
    k, r, old = (torch.randn(*shape, dtype=torch.float64) for shape in ((WIDTH, 2), (OUT, 2), (WIDTH, 4)))
    s = old @ old.T
    by_paper = r @ k.T @ p @ torch.linalg.inv(s @ p + k @ k.T @ p + 10 * torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(solve_update(k, r, p, s, l2=10), by_paper, rtol=1e-9, atol=1e-12)


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
