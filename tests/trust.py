"""How much is tried: a slice with every run of the tests, all of it by ``make trust``, which keeps what it found."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

FULL = bool(os.environ.get("DPFAST_TRUST"))


def tries(few: int, many: int) -> Callable[..., Any]:
    """``few`` inputs of hypothesis, always the same, or ``many``, other ones each time."""
    return settings(
        max_examples=many if FULL else few,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink what failed takes minutes: that is for who looks for the cause
    )


def record(name: str, **row: Any) -> None:
    """Keep what a full run found."""
    if FULL:
        from benchmarks import results

        results.append("trust", {"name": name, **row})
