"""``noise`` on a GPU, in Triton: a program makes eight numbers each of some blocks of the stream."""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.box_muller import box_muller
from dpfast.kernels.launch import blocks

BLOCKS = 256  # of the stream, in a program
WARPS = 4


@triton.jit
def _turned(x, BY: tl.constexpr):
    return (x << BY) | (x >> (32 - BY))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _turned(d ^ a, 16)
    c += d
    b = _turned(b ^ c, 12)
    a += b
    d = _turned(d ^ a, 8)
    c += d
    b = _turned(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _uniform(low, high):
    """1 - k / 2^52, k the upper 52 bits of a word of 64."""
    bits = (high.to(tl.uint64) << 20) | (low.to(tl.uint64) >> 12) | 0x3FF0000000000000
    return 2.0 - bits.to(tl.float64, bitcast=True)


@triton.jit
def _on_grid(x, shift):
    """The nearest multiple of a grid: adding 1.5 * 2^52 of it leaves no bit below it. A shift of 0 rounds nothing."""
    return (x + shift) - shift


@triton.jit
def _put(x, out, at, inside, z, scale, divisor, shift):
    old = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + at, (_on_grid(old, shift) + _on_grid(scale * z, shift)) / divisor, mask=inside)


@triton.jit
def add_noise(x, out, n, m, table, BLOCKS: tl.constexpr):
    """Table ``[11]``: the words of the key; scale, divisor and shift, by their bits. m: blocks of the stream, n:
    numbers.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    none = tl.zeros((BLOCKS,), tl.uint32)
    k0, k1 = none + tl.load(table).to(tl.uint32), none + tl.load(table + 1).to(tl.uint32)
    k2, k3 = none + tl.load(table + 2).to(tl.uint32), none + tl.load(table + 3).to(tl.uint32)
    k4, k5 = none + tl.load(table + 4).to(tl.uint32), none + tl.load(table + 5).to(tl.uint32)
    k6, k7 = none + tl.load(table + 6).to(tl.uint32), none + tl.load(table + 7).to(tl.uint32)
    c0, c1, c2, c3 = none + 0x61707865, none + 0x3320646E, none + 0x79622D32, none + 0x6B206574
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, b.to(tl.uint32), none, none, none
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    of_radius = (
        _uniform(x0 + c0, x1 + c1),
        _uniform(x2 + c2, x3 + c3),
        _uniform(x4 + k0, x5 + k1),
        _uniform(x6 + k2, x7 + k3),
    )
    of_angle = (
        _uniform(x8 + k4, x9 + k5),
        _uniform(x10 + k6, x11 + k7),
        _uniform(x12 + b.to(tl.uint32), x13),
        _uniform(x14, x15),
    )
    scale = tl.load(table + 8).to(tl.float64, bitcast=True)
    divisor = tl.load(table + 9).to(tl.float64, bitcast=True)
    shift = tl.load(table + 10).to(tl.float64, bitcast=True)
    wide = tl.full((), 0, tl.int64) + m  # or products of it would be of 32 bits
    for j in tl.static_range(4):
        cosine, sine = box_muller(of_radius[j], of_angle[j])
        at, behind = j * wide + b, (j + 4) * wide + b
        _put(x, out, at, (b < m) & (at < n), cosine, scale, divisor, shift)
        _put(x, out, behind, (b < m) & (behind < n), sine, scale, divisor, shift)


def noised(x: Tensor, out: Tensor, scale: float, divisor: float, grid: float, key: Sequence[int]) -> None:
    """Into ``out [n]``."""
    m = blocks(len(x), 8)
    if m:
        numbers = struct.unpack("<3q", struct.pack("<3d", scale, divisor, 1.5 * 2.0**52 * grid))
        table = torch.tensor([*key, *numbers], dtype=torch.int64, device="cpu").to(x.device, non_blocking=True)
        add_noise[(blocks(m, BLOCKS),)](x, out, len(x), m, table, BLOCKS=BLOCKS, num_warps=WARPS)
