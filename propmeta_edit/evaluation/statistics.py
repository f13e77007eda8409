"""Intervals for shares of cases, and paired tests between two methods on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, as (low, high) in 0 to 1.

    Raises:
        ValueError: ``n`` is 0, or ``successes`` is not in 0 to n.
    """
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """Two methods on the same n cases.

    Attributes:
        difference: accuracy of the first minus accuracy of the second, in -1 to 1.
        low, high: 95 % interval of the difference, percentile bootstrap over cases; from Wilson's interval where all cases agree,
            since a bootstrap of equal values has no width.
        wins, losses: cases that only the first, or only the second, answers.
        p_value: McNemar's exact test, two-sided: are wins and losses equally likely?
    """

    n: int
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p_value: float


def compare_paired(first: Sequence[bool], second: Sequence[bool], num_resamples: int = 10_000, seed: int = 0) -> PairedComparison:
    """Paired bootstrap and McNemar's exact test of two lists of verdicts, case by case.

    Raises:
        ValueError: the lists are empty or of different length.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"a paired comparison needs two equally long lists of verdicts, got {len(first)} and {len(second)}")
    gains = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    # Resampling cases changes only how often each of +1, 0 and -1 is drawn.
    n = len(gains)
    if (gains == gains[0]).all():
        low, high = _interval_of_equal(float(gains[0]), n)
    else:
        drawn = np.random.default_rng(seed).multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], size=num_resamples)
        low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return PairedComparison(n, float(gains.mean()), float(low), float(high), wins, losses, p_value)


def _interval_of_equal(gain: float, n: int) -> tuple[float, float]:
    """Of n cases with the same gain of -1, 0 or 1: a share of others up to Wilson's bound may have been missed."""
    missed = wilson_interval(0, n)[1]
    if gain == 0:
        return -missed, missed
    return (1 - 2 * missed, 1.0) if gain > 0 else (-1.0, 2 * missed - 1)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values of a family of tests that can each be held against one level; order kept."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, num_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sum over cases divided by another, with the 95 % percentile bootstrap over cases; with ones below, a mean.

    A ratio of sums does not explode where a single case's denominator is near zero, as a mean of ratios does.

    Args:
        numerators, denominators: [n, m], a case a row; NaN in either leaves that case out of that column.

    Returns:
        (ratio, low, high), [m] each; NaN where a column has no case.

    Raises:
        ValueError: no case, or shapes that differ.
    """
    if numerators.ndim != 2 or numerators.shape != denominators.shape or not len(numerators):
        raise ValueError(f"two equal [n, m] arrays of at least one case are needed, got {numerators.shape}, {denominators.shape}")
    valid = ~(np.isnan(numerators) | np.isnan(denominators))
    above, below = np.where(valid, numerators, 0.0), np.where(valid, denominators, 0.0)
    n = len(above)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (counts @ above) / (counts @ below)
        ratio = above.sum(axis=0) / below.sum(axis=0)
    known = valid.any(axis=0)
    low, high = (np.where(known, np.nanpercentile(np.where(known, drawn, 0.0), q, axis=0), np.nan) for q in (2.5, 97.5))
    return np.where(known, ratio, np.nan), low, high


def mean_interval(values: np.ndarray, num_resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over cases [n, m] with their 95 % percentile bootstrap intervals; NaN is left out. As ``ratio_interval``."""
    return ratio_interval(values, np.ones_like(values), num_resamples, seed)


def pair_mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean over all pairs of n things, given each one's mean over its n - 1 pairs, with its 95 % interval: (mean, low, high).

    The given means share their pairs, so a bootstrap of them would be too narrow by half and more. Leaving one thing out after the
    other (jackknife; Arvesen, 1969) needs nothing else: without the i-th the mean moves by ``2 (mean - values[i]) / (n - 2)``.

    Raises:
        ValueError: fewer than three.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"an interval of a mean over pairs needs three things or more, got {n}")
    mean = float(values.mean())
    moves = 2 * (mean - values) / (n - 2)
    half = float(student_t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * (moves**2).sum()))
    return mean, mean - half, mean + half
