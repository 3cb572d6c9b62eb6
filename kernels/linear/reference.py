"""The formulas for a linear map, in any dtype; low precision is computed in float32."""

import torch
from torch import Tensor

from dpfast.kernels.clip.reference import sq_norms as squares
from dpfast.kernels.precision import accumulation_dtype, full_precision, gram, gram_error, vanished


def per_example_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``G [B, P, D]``, and ``|G_i|^2 [B]`` of the numbers stored."""
    grads = weight_grads(a, g)
    return grads, squares(grads.flatten(1))


@full_precision()
def weight_grads(a: Tensor, g: Tensor) -> Tensor:
    """``G [B, ..., P, D]``."""
    dtype = accumulation_dtype(a, g)
    return g.to(dtype).mT @ a.to(dtype)


def sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """``|G_i|^2 [B]`` with one G_i alive at a time: a sum of squares, never negative."""
    norms = [squares(weight_grads(a_i, g_i).reshape(1, -1)) for a_i, g_i in zip(a, g, strict=True)]
    return torch.cat(norms) if norms else a.new_zeros(0, dtype=torch.float64)


@full_precision()
def gram_sq_norms(a: Tensor, *gs: Tensor) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>`` and a bound on its rounding error, both ``[B]``.

    Several g are taken side by side, as one whose inner products are the sums of theirs. The sum cancels where
    positions cancel, so the result can be far too small, even negative. The bound is ``gram_error(...) (sum_t |a_t|
    |g_t|)^2``, and what vanishes below the smallest normal number. Squared norms as small as that vanish: no clip norm
    is.
    """
    if a.shape[-2] == 1:
        return _of_one_row(a, gs)
    dtype = accumulation_dtype(a, *gs)
    a, gs = a.to(dtype), tuple(g.to(dtype) for g in gs)
    products = gram(gs[0])
    for g in gs[1:]:
        products += gram(g)
    products *= gram(a)
    length = torch.stack([g.norm(dim=-1) for g in gs]).norm(dim=0)
    of_a, d, outputs = a.norm(dim=-1), a.shape[-1], [g.shape[-1] for g in gs]
    error = gram_error(d, max(outputs), dtype, steps=len(gs))
    bound = error * (of_a * length).sum(-1).square().double() + vanished(d, sum(outputs), of_a, length, dtype)
    return products.flatten(1).sum(1, dtype=torch.float64), bound.unsqueeze(-1).flatten(1).sum(1)


def _of_one_row(a: Tensor, gs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 = |a|^2 |g|^2`` where M is 1: nothing cancels, and squares are added up in float64."""
    of_a, *of_gs = (torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64).square() for t in (a, *gs))
    sq = (of_a * torch.stack(of_gs).sum(0)).flatten(1).sum(1)
    additions = a[:1].numel() + sum(g[:1].numel() for g in gs) + 8
    return sq, additions * torch.finfo(torch.float64).eps * sq


def clipped_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [..., P, D]`` of the very ``G_i`` that are measured, one alive at a time."""
    dtype = accumulation_dtype(a, g)
    total = torch.zeros((*g.shape[1:-2], g.shape[-1], a.shape[-1]), dtype=dtype, device=a.device)
    for factor, a_i, g_i in zip(w.to(dtype), a, g, strict=True):
        total += torch.where(factor > 0, factor * weight_grads(a_i, g_i), 0)
    return total


@full_precision()
def weighted_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [..., P, D]`` in one matrix product, which rounds every ``w_i g``."""
    dtype = accumulation_dtype(a, g)
    weight = w.to(dtype).view(-1, *[1] * (a.ndim - 1))
    kept = weight > 0
    a, g = a.to(dtype), weight * g.to(dtype)
    if a.device.type != "cpu" or not kept.all():  # to look costs less than to copy, unless a GPU has to be waited for
        a, g = torch.where(kept, a, 0), torch.where(kept, g, 0)
    return g.movedim(0, -3).flatten(-3, -2).mT @ a.movedim(0, -3).flatten(-3, -2)
