"""The formulas for an embedding table."""

import torch
from torch import Tensor

from dpfast.kernels.clip.reference import sq_norms as squares
from dpfast.kernels.precision import accumulation_dtype, full_precision, gram_error


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


def sq_norms(index: Tensor, g: Tensor, rows: int) -> Tensor:
    """``|G_i|^2 [B]`` with one table alive at a time."""
    norms = [squares(per_example_grads(i[None], g_i[None], rows).flatten(1)) for i, g_i in zip(index, g, strict=True)]
    return torch.cat(norms) if norms else g.new_zeros(0, dtype=torch.float64)


def clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [V, D]`` of the very ``G_i`` that are measured; ``w_i = 0`` contributes exactly 0."""
    total = torch.zeros(rows, g.shape[-1], dtype=accumulation_dtype(g), device=g.device)
    for factor, i, g_i in zip(w.to(total.dtype), index, g, strict=True):
        total += torch.where(factor > 0, factor * per_example_grads(i[None], g_i[None], rows)[0], 0)
    return total


def weighted_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """The same in one pass over ``g``, which rounds every ``w_i g``."""
    g = g.to(accumulation_dtype(g))
    weight = w.to(g.dtype).view(-1, 1, 1)
    g = torch.where(weight > 0, weight * g, 0)
    return g.new_zeros(rows, g.shape[-1]).index_add_(0, index.flatten(), g.flatten(0, 1))
