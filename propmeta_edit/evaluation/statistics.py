"""Intervals for shares of cases, and paired tests between two methods on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


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
        low, high: 95 % interval of the difference, percentile bootstrap over cases.
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
    drawn = np.random.default_rng(seed).multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], size=num_resamples)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return PairedComparison(n, float(gains.mean()), float(low), float(high), wins, losses, p_value)
