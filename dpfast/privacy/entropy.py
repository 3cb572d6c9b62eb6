"""The one source of private randomness: the operating system. No seed reaches it.

Guarantee: every noise coordinate and every sampling decision is derived from fresh bytes of ``os.urandom``;
nothing (a recipe, a checkpoint, torch's or numpy's global generators) can repeat or predict them. Tests
replace the source with ``dpfast.testing.injected_entropy``, and everything written meanwhile carries
``TEST_ENTROPY``.
"""

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

TEST_ENTROPY = "TEST ENTROPY: no guarantee"

# Numbers drawn at a time, so that the noise of 100M parameters needs little more than its own memory.
_CHUNK = 1 << 20

# Replaced by ``dpfast.testing`` and by nobody else.
source: Callable[[int], bytes] = os.urandom


def is_injected() -> bool:
    """True while ``dpfast.testing.injected_entropy`` replaces the operating system."""
    return source is not os.urandom


def random_bytes(count: int) -> bytes:
    """``count`` unpredictable bytes."""
    return source(count)


def uniform(count: int) -> NDArray[np.float64]:
    """``count`` float64 numbers k / 2^53, k uniform on 0 .. 2^53 - 1: 1 - u is exact and never 0."""
    words = np.frombuffer(random_bytes(8 * count), dtype=np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def standard_normal(shape: Sequence[int]) -> torch.Tensor:
    """Independent N(0, 1) draws, float64 on the CPU, of the given shape.

    Box-Muller on 53-bit uniforms (Box and Muller 1958). Draws beyond 8.57 standard deviations, which a true
    normal produces with probability below 2^-53, do not occur; the attacks on floating-point noise of Mironov
    (2012) are not excluded, and the privacy statement says so.
    """
    out = np.empty(math.prod(shape))
    for start in range(0, out.size, _CHUNK):
        part = out[start : start + _CHUNK]
        part[:] = _box_muller(part.size)
    return torch.from_numpy(out).reshape(tuple(shape))


def _box_muller(count: int) -> NDArray[np.float64]:
    pairs = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform(pairs)))
    angle = 2.0 * np.pi * uniform(pairs)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
