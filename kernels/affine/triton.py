"""``affine`` on a GPU, in Triton: one pass over a and g.

Memory-bound: 3 B M C S FLOPs over one read of both. A program adds up some rows and positions of some channels: STEPS
numbers at most in float32, one after the other, and what is left in float64. Where there are few examples, or many
positions, several programs share one, and their parts are added up in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.launch import blocks, padded, processors

WAVES = 4  # programs for each processor, so that the last wave is a small part
WARPS = 4
TILE = 2048  # numbers
STEPS = 64  # tiles that a program adds up, so that rounding does not grow with positions


@triton.jit
def sums(
    a, g, a_i, a_m, a_c, a_s, g_i, g_m, g_c, g_s, M, C, S, each, weight, bias,
    BC: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Of ``g [B, M, C, S]``, and of ``a * g`` if SCALED, over ``each`` rows-and-positions: parts ``[B, parts, C]``."""
    across = tl.cdiv(C, BC)
    parts = tl.cdiv(M * S, each)
    program = tl.program_id(0)
    i = (program // (across * parts)).to(tl.int64)
    part = program // across % parts
    c = program % across * BC + tl.arange(0, BC)
    of_weight, of_bias = tl.zeros((BK, BC), tl.float32), tl.zeros((BK, BC), tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, M * S), BK):
        at = start + tl.arange(0, BK)
        m, s = (at // S).to(tl.int64)[:, None], (at % S)[:, None]
        inside = (at < tl.minimum((part + 1) * each, M * S))[:, None] & (c < C)[None, :]
        y = tl.load(g + i * g_i + m * g_m + s * g_s + c[None, :] * g_c, mask=inside, other=0.0).to(tl.float32)
        of_bias += y
        if SCALED:
            x = tl.load(a + i * a_i + m * a_m + s * a_s + c[None, :] * a_c, mask=inside, other=0.0).to(tl.float32)
            of_weight += x * y
    place = (i * parts + part) * C + c
    tl.store(bias + place, tl.sum(of_bias.to(tl.float64), 0), mask=c < C)
    if SCALED:
        tl.store(weight + place, tl.sum(of_weight.to(tl.float64), 0), mask=c < C)


def affine_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``weight = sum_{m,s} a * g``, ``bias = sum_{m,s} g``; [B, M, C, S] -> two [B, C], float32."""
    weight, bias = _sums(a, g, scaled=True)
    return weight, bias


def bias_grads(g: Tensor) -> Tensor:
    """``sum_{m,s} g``; [B, M, C, S] -> [B, C]."""
    return _sums(g, g, scaled=False)[1]


def tile(c: int, positions: int, *, dense_channels: bool) -> tuple[int, int]:
    """Channels and positions of a tile: long along what lies next to each other."""
    width = min(padded(c), 128 if dense_channels else 8)
    return width, max(16, min(padded(max(1, positions)), TILE // width))


def _sums(a: Tensor, g: Tensor, *, scaled: bool) -> Tensor:
    examples, m, c, s = g.shape
    width, length = tile(c, m * s, dense_channels=g.stride(2) == 1)
    across = blocks(c, width)
    filling = blocks(WAVES * processors(g.device), max(1, examples * across))
    parts = max(1, min(blocks(m * s, length), max(filling, blocks(m * s, STEPS * length))))
    each = blocks(blocks(m * s, parts), length) * length
    parts = blocks(m * s, each) if m * s else 1
    found = g.new_empty((2, examples, parts, c), dtype=torch.float32)
    if not g.numel():
        return found.zero_().sum(2)
    sums[(examples * parts * across,)](
        a, g, *a.stride(), *g.stride(), m, c, s, each, found[0], found[1],
        BC=width, BK=length, SCALED=scaled, num_warps=WARPS,
    )  # fmt: skip
    return found[:, :, 0] if parts == 1 else found.sum(2, dtype=torch.float64).float()
