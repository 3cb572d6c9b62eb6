"""Whether gradients, or what was computed in other shapes, are the same by the norms of their rows, up to rounding.

Entry by entry: ``clipping.rounding``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.clipping.rounding import real


def rows_apart(one: Tensor, other: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The squared distance ``[rows]`` between two tensors of one shape, and the squared norm of the first: of what is
    finite in both; infinite where only one is.
    """
    if not one.numel():
        nothing = torch.zeros(rows, dtype=torch.float64, device=one.device)
        return nothing, nothing
    a, b = (real(t).reshape(rows, -1) for t in (one, other))
    finite, apart = a.isfinite() & b.isfinite(), a.isfinite() != b.isfinite()
    distance = torch.where(finite, a - b, 0.0).masked_fill(apart, torch.inf).square().sum(1)
    return distance, torch.where(finite, a, 0.0).square().sum(1)


def alike(one: Tensor, other: Tensor, *, rough: float, faint: float = 0.0) -> bool:
    """Up to rounding, in the norm of each entry of the first dimension: ``rough`` of its own, ``faint`` of the largest.

    What is no floating-point number is to be equal.
    """
    if one.shape != other.shape or not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    if not one.numel():
        return True
    distance, size = (squared.sqrt() for squared in rows_apart(one, other, len(one) if one.ndim else 1))
    return bool((distance <= roughness([one], rough) * size + faint * size.max()).all())


def roughness(tensors: Sequence[Tensor], least: float) -> float:
    """Of the norms of what has the tensors' types."""
    return max(least, *(8 * torch.finfo(t.dtype).eps for t in tensors), 0.0)
