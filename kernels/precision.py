"""The dtype in which per-example quantities are accumulated, the precision of products, and how far Grams err."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: half precision is never summed in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@contextmanager
def without_autocast() -> Iterator[None]:
    """Whatever is computed inside keeps its dtype: a matrix product of float32 under ``torch.autocast`` would not."""
    lowered = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    try:
        for kind in lowered:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind in lowered:
            torch.set_autocast_enabled(kind, True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are computed in float32, even where the process allows TF32, bfloat16 or autocast.

    Bounds on rounding errors (of a Gram, of a weighted sum) are for the precision of the dtype. Use as a decorator.
    """
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    allowed = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with without_autocast():
            yield
    finally:
        for place, precision in zip(places, allowed, strict=True):
            place.fp32_precision = precision


BLOCK = 256  # features whose products are added up before their sums are


def gram(x: Tensor) -> Tensor:
    """``x @ x.mT [..., M, M]`` of ``x [..., M, D]``, with an error that grows with D / BLOCK instead of D."""
    first, *rest = x.split(BLOCK, dim=-1)
    total = first @ first.mT
    for block in rest:
        total += block @ block.mT
    return total


def gram_error(d: int, p: int, dtype: torch.dtype, steps: int = 0) -> float:
    """How far ``sum_{t,s} <a_t, a_s> <g_t, g_s>`` may err, relative to ``(sum_t |a_t| |g_t|)^2``.

    d, p: features of a and g, whose inner products come from ``gram``. steps: additions in ``dtype`` that a product
    goes through afterwards, in a chain.

    n products that are added up in any order err by at most n roundings u = eps / 2 of the sum of their magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). A bound for *random* roundings, 4 sqrt(n) u,
    does not hold: where all features are alike, they round alike.
    """
    roundings = sum(min(n, BLOCK) + math.ceil(n / BLOCK) for n in (d, p)) + steps + 8
    return 1.01 * roundings * torch.finfo(dtype).eps / 2


def vanished(d: int, p: int, of_a: Tensor, of_g: Tensor, dtype: torch.dtype) -> Tensor:
    """What products below the smallest normal number add to that error, from the lengths ``|a_t|``, ``|g_t| [..., M]``.

    An inner product of n of them errs by n such numbers u: in all ``u (D (sum_t |g_t|)^2 + P (sum_t |a_t|)^2)``. Each
    length has lost up to ``sqrt(n u)`` itself. It matters where one factor is tiny and the other huge.
    """
    tiny = torch.finfo(dtype).tiny
    sum_a, sum_g = ((t.double() + math.sqrt(n * tiny)).sum(-1) for t, n in ((of_a, d), (of_g, p)))
    return tiny * (d * sum_g.square() + p * sum_a.square())
