"""The formulas for an embedding table."""

import torch
from torch import Tensor

from dpfast.kernels.chunks import chunks
from dpfast.kernels.clip.reference import sq_norms as squares
from dpfast.kernels.precision import accumulation_dtype, full_precision, gram, gram_error


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
    sq = (gram(g) * same).sum((1, 2), dtype=torch.float64)
    magnitude = g.norm(dim=-1).sum(-1).square().double()
    return sq, gram_error(1, g.shape[2], g.dtype) * magnitude


def looked_up(index: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``G_i`` that are not zero: their numbers ``[B, M]`` and themselves ``[B, M, D]``.

    An example that looked a row up twice has one place too many: number 0, and zeros.
    """
    order = index.argsort(dim=1, stable=True)
    index = index.gather(1, order)
    place = torch.cat((torch.zeros_like(index[:, :1]), index.diff(dim=1).ne(0)), 1).cumsum(1)
    g = g.to(accumulation_dtype(g)).gather(1, order.unsqueeze(-1).expand_as(g))
    numbers = torch.zeros_like(index).scatter_(1, place, index)
    return numbers, torch.zeros_like(g).scatter_add_(1, place.unsqueeze(-1).expand_as(g), g)


def sq_norms(index: Tensor, g: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    """``|G_i|^2 [B]`` of the rows that were looked up: a sum of squares, never negative."""
    parts = chunks(chunk_bytes(g), len(index))
    return torch.cat([squares(looked_up(index[of], g[of])[1].flatten(1)) for of in parts])


def clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [V, D]`` of the very ``G_i`` that are measured; ``w_i = 0`` contributes exactly 0."""
    total = torch.zeros(rows, g.shape[-1], dtype=accumulation_dtype(g), device=g.device)
    for of in chunks(chunk_bytes(g), len(index)):
        _add(total, *looked_up(index[of], g[of]), w[of])
    return total


def weighted_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """The same in one pass over ``g``, which rounds every ``w_i g``."""
    total = torch.zeros(rows, g.shape[-1], dtype=accumulation_dtype(g), device=g.device)
    return _add(total, index, g.to(total.dtype), w)


def chunk_bytes(g: Tensor) -> int:
    """Of one example's ``looked_up``: gradients in order, and their sums."""
    return int(2 * g[:1].numel() * accumulation_dtype(g).itemsize)


def _add(total: Tensor, index: Tensor, g: Tensor, w: Tensor) -> Tensor:
    weight = w.to(g.dtype).view(-1, 1, 1)
    return total.index_add_(0, index.flatten(), torch.where(weight > 0, weight * g, 0).flatten(0, 1))
