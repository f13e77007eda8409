"""Intervals for shares of cases."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, as (low, high) in 0 to 1.

    Raises:
        ValueError: ``n`` is 0, or ``successes`` is not in 0 to n.
    """
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
