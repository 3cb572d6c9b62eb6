"""``embedding`` on a GPU, in Triton: look-ups are sorted by table row and example, then equal ones are added up.

    gradients       G_i[v] = sum over m of g[i,m], stored or squared    reads g [B, M, D] once
    weighted_sums   sum_i w_i G_i, table row by table row               reads as many numbers, writes V D

Memory-bound: B M D additions each. A number of ``G_i`` is added up in float32, one m after the other whatever it is
for, so that what is measured is bit by bit what is summed later. No two programs write to one place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.chunks import chunks
from dpfast.kernels.embedding import reference
from dpfast.kernels.launch import blocks, padded

FEATURES = 512  # of a program of ``gradients``, four for each thread
STEPS = 4  # look-ups whose gradients it loads at a time
TILE = 128, 16  # features and look-ups of a program of ``weighted_sums``

gram_sq_norms = reference.gram_sq_norms  # of products alone: torch adds up in one order


@triton.jit
def gradients(
    g, g_i, g_m, g_d, pairs, order, B, M, D, out, out_i, out_m, out_v,
    BD: tl.constexpr, STEPS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """A program for each look-up and block of D: an example's first of a table row adds up those that are alike.

    out: D numbers at i, m and v times the strides; if SQUARED, one for each block.
    """
    across = tl.cdiv(D, BD)
    program = tl.program_id(0)
    at, block = program // across, program % across
    pair = tl.load(pairs + at)
    if tl.load(pairs + at - 1, mask=at > 0, other=-1) != pair:
        v, i = pair // B, pair % B
        d = block.to(tl.int64) * BD + tl.arange(0, BD)
        start, end, inside = i * M, B * M, d < D
        to = out + i * out_i + (tl.load(order + at) - start) * out_m + v * out_v
        gradient = g + i * g_i + d * g_d
        total, is_alike = tl.zeros((BD,), tl.float32), at >= 0
        while is_alike:
            for _ in tl.static_range(STEPS):
                is_alike = tl.load(pairs + at, mask=at < end, other=-1) == pair
                m = tl.load(order + at, mask=is_alike, other=0) - start
                total += tl.load(gradient + m * g_m, mask=is_alike & inside, other=0.0).to(tl.float32)
                at += 1
        if SQUARED:
            tl.store(to + block, tl.sum(total * total))
        else:
            tl.store(to + d, total, mask=inside)


@triton.jit
def weighted_sums(
    x, x_i, x_m, x_d, pairs, order, starts, w, M, D, out, out_v,
    BD: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """A program for each table row and block of D: ``sum w_i x[i,m]`` of its look-ups, BN at a time.

    FIRST: of an example's first one alone, where ``gradients`` has stored. starts ``[V + 1]``: of rows, in ``pairs``.
    """
    across = tl.cdiv(D, BD)
    program = tl.program_id(0)
    v = (program // across).to(tl.int64)
    d = (program % across).to(tl.int64) * BD + tl.arange(0, BD)
    total = tl.zeros((BN, BD), tl.float32)
    end = tl.load(starts + v + 1)
    for start in range(tl.load(starts + v), end, BN):
        at = start + tl.arange(0, BN)
        inside = at < end
        place = tl.load(order + at, mask=inside, other=0)
        if FIRST:
            before = tl.load(pairs + at - 1, mask=inside & (at > 0), other=-1)
            inside &= tl.load(pairs + at, mask=inside, other=-1) != before
        i, m = place // M, place % M
        weight = tl.load(w + i, mask=inside, other=0.0)[:, None]
        kept = (weight > 0) & (d < D)[None, :]
        y = tl.load(x + (i * x_i + m * x_m)[:, None] + d[None, :] * x_d, mask=kept, other=0.0).to(tl.float32)
        total += tl.where(kept, weight * y, 0.0)
    tl.store(out + v * out_v + d, tl.sum(total.to(tl.float64), 0), mask=d < D)


def per_example_grads(index: Tensor, g: Tensor, rows: int) -> Tensor:
    """``G [B, V, D]`` for a table of ``rows`` = V rows."""
    out = g.new_zeros((len(g), rows, g.shape[2]), dtype=torch.float32)
    _gradients(g, *_sorted(index), out, (out.stride(0), 0, out.stride(1)))
    return out


def sq_norms(index: Tensor, g: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    """``|G_i|^2 [B]``, float64, of the rows that ``clipped_sum`` adds up; none is stored."""
    parts = g.new_zeros((*g.shape[:2], blocks(g.shape[2], FEATURES)), dtype=torch.float32)
    _gradients(g, *_sorted(index), parts, (parts.stride(0), parts.stride(1), 0), squared=True)
    return parts.sum((1, 2), dtype=torch.float64)


def clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [V, D]`` of the very ``G_i`` that are measured, some features after the others."""
    pairs, order = _sorted(index)
    total = g.new_empty((rows, g.shape[2]), dtype=torch.float32)
    for of in chunks(4 * index.numel(), g.shape[2]):
        own = g.new_empty(g[..., of].shape, dtype=torch.float32)
        _gradients(g[..., of], pairs, order, own, (own.stride(0), own.stride(1), 0))
        _weighted_sums(own, pairs, order, w, total[:, of], first=True)
    return total


def weighted_sum(index: Tensor, g: Tensor, rows: int, w: Tensor) -> Tensor:
    """The same in one pass over ``g``, which rounds every ``w_i g``."""
    total = g.new_empty((rows, g.shape[2]), dtype=torch.float32)
    _weighted_sums(g, *_sorted(index), w, total, first=False)
    return total


def _sorted(index: Tensor) -> tuple[Tensor, Tensor]:
    """Look-ups as numbers ``v B + i [B M]`` in order, and their places ``i M + m``, in order among equal ones."""
    pairs = torch.add(torch.arange(len(index), device=index.device).unsqueeze(1), index, alpha=len(index))
    return pairs.flatten().sort(stable=True)


def _gradients(
    g: Tensor, pairs: Tensor, order: Tensor, out: Tensor, strides: tuple[int, int, int], *, squared: bool = False
) -> None:
    width = min(padded(g.shape[2]), FEATURES)
    if g.numel():
        gradients[(len(pairs) * blocks(g.shape[2], width),)](
            g, *g.stride(), pairs, order, *g.shape, out, *strides,
            BD=width, STEPS=STEPS, SQUARED=squared, num_warps=max(1, width // 128),
        )  # fmt: skip


def _weighted_sums(x: Tensor, pairs: Tensor, order: Tensor, w: Tensor, total: Tensor, *, first: bool) -> None:
    examples, m, d = x.shape
    width, length = min(padded(d), TILE[0]), TILE[1]
    starts = torch.searchsorted(pairs, examples * torch.arange(len(total) + 1, device=x.device), out_int32=True)
    if total.numel():
        weighted_sums[(len(total) * blocks(d, width),)](
            x, *x.stride(), pairs, order, starts, w.float().contiguous(), m, d, total, total.stride(0),
            BD=width, BN=length, FIRST=first, num_warps=4,
        )  # fmt: skip
