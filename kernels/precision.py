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
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are computed in float32, even where the process allows TF32 or bfloat16.

    Bounds on rounding errors (of a Gram, of a weighted sum) are for the precision of the dtype. Use as a decorator.
    """
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    allowed = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, allowed, strict=True):
            place.fp32_precision = precision


def gram_error(m: int, d: int, p: int, dtype: torch.dtype) -> float:
    """Relative rounding error of ``sum_{t,s} <a_t, a_s> <g_t, g_s>`` over m positions, against norms.

    An inner product of length n errs by at most ``4 sqrt(n) u`` of the product of the norms, u = eps / 2, but with
    negligible probability (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, lambda = 4); the pairwise sum over m^2 terms
    by ``log2(m^2) u``, doubled here.
    """
    return (2 * math.sqrt(d) + 2 * math.sqrt(p) + 2 * math.log2(max(m, 2))) * torch.finfo(dtype).eps
