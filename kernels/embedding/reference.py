"""The formulas for an embedding table."""

import torch
from torch import Tensor

from dpfast.kernels.linear.reference import gram_error
from dpfast.kernels.precision import accumulation_dtype, full_precision


def per_example_grads(index: Tensor, g: Tensor, rows: int) -> Tensor:
    """``G [B, V, D]`` for a table of ``rows`` = V rows."""
    g = g.to(accumulation_dtype(g))
    out = g.new_zeros(len(index), rows, g.shape[-1])
    return out.scatter_add_(1, index.unsqueeze(-1).expand_as(g), g)


@full_precision()
def gram_sq_norms(index: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` without the table, and a bound on its rounding error ``[B]``: a Gram of unit vectors."""
    g = g.to(accumulation_dtype(g))
    same = index.unsqueeze(2) == index.unsqueeze(1)
    sq = ((g @ g.mT) * same).sum((1, 2))
    magnitude = g.norm(dim=-1).sum(-1).square()
    return sq, gram_error(g.shape[1], 1, g.shape[2], g.dtype) * magnitude


def direct_sq_norms(index: Tensor, g: Tensor, rows: int) -> Tensor:
    """``|G_i|^2 [B]`` with one table alive at a time."""
    norms = [per_example_grads(i[None], g_i[None], rows).square().sum() for i, g_i in zip(index, g, strict=True)]
    return torch.stack(norms) if norms else g.new_zeros(0, dtype=accumulation_dtype(g))


def clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [V, D]``; an example with ``w_i = 0`` contributes exactly 0."""
    g = g.to(accumulation_dtype(g))
    weight = w.to(g.dtype).view(-1, 1, 1)
    g = torch.where(weight > 0, weight * g, 0)
    return g.new_zeros(rows, g.shape[-1]).index_add_(0, index.flatten(), g.flatten(0, 1))
