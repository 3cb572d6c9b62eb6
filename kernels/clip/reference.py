"""The formulas of clipping."""

import torch
from torch import Tensor


def clip_factors(sq: Tensor, max_grad_norm: float) -> Tensor:
    """``w_i = min(1, C / sqrt(sq_i))``, and 0 where ``sq_i`` is not finite: such an example contributes nothing."""
    factors = (max_grad_norm / sq.clamp(min=0).sqrt()).clamp(max=1.0)  # a cancelling Gram may be negative
    return torch.where(sq.isfinite(), factors, 0)


def clipped_sum(grads: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i``; an example with ``w_i = 0`` contributes exactly 0, whatever its values."""
    order = sorted(range(1, grads.ndim), key=grads.stride, reverse=True)  # as it lies in memory: no copy
    in_memory = grads.permute(0, *order)
    flat = in_memory.unsqueeze(-1).flatten(1)
    weight = w.to(grads.dtype)
    total = weight @ torch.where((weight > 0).unsqueeze(1), flat, 0)
    inverse = [order.index(dim) for dim in range(1, grads.ndim)]
    return total.view(in_memory.shape[1:]).permute(inverse)
