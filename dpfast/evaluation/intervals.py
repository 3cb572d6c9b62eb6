"""What a number of test images can show: 95% intervals of accuracies and of their differences."""

import math

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
