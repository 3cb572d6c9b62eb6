"""What a number of test images can show: 95% intervals of accuracies, of their differences and of their ranks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpfast.errors import DataError

_Z = 1.959964  # 97.5% quantile of the standard normal


def accuracy_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's interval of an accuracy (0 to 1) measured on ``images`` independent images (Wilson 1927)."""
    shrink = 1 + _Z**2 / images
    center = (accuracy + _Z**2 / (2 * images)) / shrink
    half = _Z * math.sqrt(accuracy * (1 - accuracy) / images + (_Z / (2 * images)) ** 2) / shrink
    return max(0.0, center - half), min(1.0, center + half)


def differ(first: float, second: float, images: int) -> bool:
    """Whether two accuracies on ``images`` images differ by more than those images can show.

    The interval of Agresti and Caffo (2000) for independent samples, which also holds near 0 and 1. Two classifiers
    that read the same images agree on most of them, so their difference is known better: this errs toward False.
    """
    moved = [(images * share + 1) / (images + 2) for share in (first, second)]
    error = math.sqrt(sum(share * (1 - share) / (images + 2) for share in moved))
    return abs(moved[0] - moved[1]) > _Z * error


def rank_correlation(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = 9999
) -> tuple[float, tuple[float, float]]:
    """Spearman's rho of paired values and its interval: 2.5% to 97.5% of a bootstrap over the pairs (Efron 1979).

    Raises DataError where either has no ranks because all its values are equal.
    """
    from scipy.stats import bootstrap, spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        raise DataError("the values to rank are all equal: no correlation of ranks can be told; use a harder test")
    found = bootstrap(
        (first, second),
        _spearman,
        paired=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(spearmanr(first, second).statistic), (float(found.low), float(found.high))


def _spearman(first: Any, second: Any, axis: int = -1) -> Any:
    """Of many resamples at once; 0 where a resample holds one value only, and so no order."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=axis) for values in (first, second)]
    a, b = (r - r.mean(axis=axis, keepdims=True) for r in ranks)
    size = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
    return (a * b).sum(axis=axis) / np.where(size > 0, size, 1.0)
