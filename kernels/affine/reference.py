"""The formula of ``affine`` in PyTorch: any floating dtype, any device, differentiable."""

import torch
from torch import Tensor


def affine_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``weight = sum_{m,s} a * g``, ``bias = sum_{m,s} g``; [B, M, C, S] -> two [B, C], float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, g = a.to(dtype), g.to(dtype)
    return (a * g).sum((1, 3)), g.sum((1, 3))


def bias_grads(g: Tensor) -> Tensor:
    """``sum_{m,s} g``; [B, M, C, S] -> [B, C]."""
    return g.sum((1, 3), dtype=torch.promote_types(g.dtype, torch.float32))
