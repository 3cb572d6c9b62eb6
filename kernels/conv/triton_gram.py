"""Grams of convolutions on a GPU, in Triton: one Gram of the input's pixels, looked at through each tap's shift.

    |G_i|^2 = sum over t, s of <g_t, g_s> sum over taps of <x_(t + tap), x_(s + tap)>

Stride 1, up to two dimensions. 2 B (pixels^2 C + M^2 (P + taps)) FLOPs, half of them by symmetry; the Gram of pixels is
stored in float32, a tile of <g_t, g_s> is held in registers. One tap is a linear map.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.chunks import in_chunks
from dpfast.kernels.conv.problem import gram_bytes, three
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.conv.triton import channels_last
from dpfast.kernels.launch import blocks, gram_bound, gram_lost
from dpfast.kernels.linear.triton import (
    add_up,
    bounded,
    constants,
    inner_products,
    launch_of,
    leave_out,
    lengths,
    tile_of,
)
from dpfast.kernels.linear.triton import gram_sq_norms as of_linear


@triton.jit
def pixel_gram(
    x, stride_i, stride_m, M, K, out,
    BM: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, M, M]`` of ``x [B, M, K]``, features next to each other."""
    i, first, second = tile_of(M, BM)
    if first <= second:
        tile = inner_products(x + i * stride_i, stride_m, 1, M, K, first, second, BM, BK, BLOCK, UPCAST, PRECISION)
        rows = (first + tl.arange(0, BM)[:, None]).to(tl.int64)
        others = (second + tl.arange(0, BM)[None, :]).to(tl.int64)
        inside = (rows < M) & (others < M)
        out += i * M * M
        tl.store(out + rows * M + others, tile, mask=inside)
        if first < second:
            tl.store(out + others * M + rows, tile, mask=inside)


@triton.jit
def _pixel(t, wide, H, W, T, dh, dw):
    """The pixel that a tap sees from each position, and whether there is one."""
    h, w = t % T // wide + dh, t % wide + dw
    return (t // T * H + h) * W + w, (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def shifted_gram(
    pixels, M_x, H, W, y, stride_i, stride_m, M, P, high, wide, taps, kernel_w,
    dilation_h, dilation_w, padding_h, padding_w, sq, magnitude,
    BM: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pixels ``[B, M_x, M_x]``; y ``[B, M, P]``, channels next to each other, M rows of ``high`` times ``wide``."""
    i, first, second = tile_of(M, BM)
    if first > second:
        leave_out(sq, magnitude)
    else:
        of_y = inner_products(y + i * stride_i, stride_m, 1, M, P, first, second, BM, BK, BLOCK, UPCAST, PRECISION)
        rows, others = first + tl.arange(0, BM)[:, None], second + tl.arange(0, BM)[None, :]
        pixels += i * M_x * M_x
        of_patches = tl.zeros((BM, BM), tl.float32)
        for tap in range(taps):
            dh = tap // kernel_w * dilation_h - padding_h
            dw = tap % kernel_w * dilation_w - padding_w
            u, is_u = _pixel(rows, wide, H, W, high * wide, dh, dw)
            v, is_v = _pixel(others, wide, H, W, high * wide, dh, dw)
            there = is_u & is_v & (rows < M) & (others < M)
            of_patches += tl.load(pixels + u.to(tl.int64) * M_x + v, mask=there, other=0.0)
        add_up(of_y * of_patches, first, second, sq, magnitude, BM)


def gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]``, and the bound on its rounding error ``[B]``."""
    x, y = (g, a) if spec.transposed else (a, g)
    rows = x.shape[0] // max(1, examples)
    pixels, positions = (_pixels(t, examples, rows) for t in (x, y))
    if math.prod(spec.kernel) == 1 and pixels.shape == (*positions.shape[:2], pixels.shape[2]):
        return of_linear(pixels, positions)

    def some(of: slice) -> tuple[Tensor, Tensor]:
        return _gram_sq_norms(pixels[of], positions[of], x.shape[2:], y.shape[2:], spec)

    return in_chunks(gram_bytes(a, g, rows), examples, some)


def _pixels(t: Tensor, examples: int, rows: int) -> Tensor:
    """``[N, C, *space]`` to ``[B, rows * pixels, C]``."""
    return channels_last(t, 1).movedim(1, -1).reshape(examples, rows * math.prod(t.shape[2:]), t.shape[1])


def _gram_sq_norms(x: Tensor, y: Tensor, space: torch.Size, out: torch.Size, spec: ConvSpec) -> tuple[Tensor, Tensor]:
    (examples, pixels, c), (_, m, p) = x.shape, y.shape
    launch = launch_of(x, y)
    settings = constants(launch, x.dtype)
    gram = x.new_empty((examples, pixels, pixels), dtype=torch.float32)
    tiles = blocks(m, launch.m) ** 2
    sq, magnitude = x.new_empty((2, examples, tiles), dtype=torch.float32)
    (_, high_x, wide_x), (_, high, wide), kernel = three(space, 1), three(out, 1), three(spec.kernel, 1)
    padding = three([before for before, _ in spec.padding], 0)
    if gram.numel() and tiles:
        pixel_gram[(examples * blocks(pixels, launch.m) ** 2,)](
            x, x.stride(0), x.stride(1), pixels, c, gram, **settings
        )
        shifted_gram[(examples * tiles,)](
            gram, pixels, high_x, wide_x, y, y.stride(0), y.stride(1), m, p, high, wide, math.prod(kernel), kernel[2],
            *three(spec.dilation, 1)[1:], *padding[1:], sq, magnitude, **settings,
        )  # fmt: skip
    taps, lost = math.prod(kernel), partial(gram_lost, c, p, lengths(x), lengths(y))
    return bounded(sq, magnitude, gram_bound(c, p, launch.m, additions=taps), lambda length: taps * lost(length))
