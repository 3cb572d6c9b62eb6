"""The formulas of clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.kernels.precision import full_precision

BLOCK = 1024


def clip_factors(sq: Tensor, max_grad_norm: float, stability: float | None = None) -> Tensor:
    """``w_i = min(1, C / sqrt(sq_i))``, with ``stability`` ``C / (sqrt(sq_i) + stability)``, and 0 where ``sq_i`` is no
    square (not finite, negative): such an example contributes nothing.
    """
    norms = sq.sqrt()
    if stability is None:
        factors = (max_grad_norm / norms).clamp(max=1.0)
    else:
        factors = max_grad_norm / (norms + stability)
    return torch.where(sq.isfinite() & (sq >= 0), factors, 0)


def sq_norms(flat: Tensor) -> Tensor:
    """``|G_i|^2 [B]`` in float64, of ``[B, n]``.

    Blocks are summed in their own dtype and added up in float64: torch's norm of a long float32 vector adds into one
    number per vector lane, and was 1e-2 low on 67 million numbers.
    """
    whole = flat.shape[1] // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1 if whole else 0, BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1)
    return blocks.double().square().sum(1) + rest.double().square()


@full_precision()
def clipped_sums(flats: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """``sum_i w_i G_i [n]`` of each ``[B, n]``; an example with ``w_i = 0`` contributes exactly 0."""
    kept = (w > 0).unsqueeze(1)
    return [w.to(flat.dtype) @ torch.where(kept, flat, 0) for flat in flats]
