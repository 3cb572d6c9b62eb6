"""``linear`` on a GPU, in Triton: gradients by the kernels of convolutions (one tap), and Grams that are never stored.

    |G_i|^2 = sum over t, s of <a_t, a_s> sum_l <g_lt, g_ls>

A program holds one tile of both Grams in registers, multiplies them and adds up; by symmetry tiles below the diagonal
are left out. B M^2 (D + P) FLOPs; reads a and g once for each tile in a row of tiles, mostly from the L2 cache; writes
two numbers per tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.conv.problem import of_linear
from dpfast.kernels.conv.triton import Gradients, channels_last, stored
from dpfast.kernels.launch import UPCAST, blocks, gram_bound, gram_lost, precision, registers
from dpfast.kernels.linear.launches import GRAMS, GramLaunch
from dpfast.kernels.precision import BLOCK

AT_ONCE = 4  # maps of one input that a launch takes


def launch_of(*tensors: Tensor) -> GramLaunch:
    """For features that lie next to each other."""
    aligned = all(t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in t.stride()[:-1]) for t in tensors)
    return GRAMS[tensors[0].dtype != torch.float32, aligned and all(t.shape[-1] % 16 == 0 for t in tensors)]


@triton.jit
def inner_products(
    x, stride_m, stride_k, M, K, first, second,
    BM: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the rows from ``first`` on with those from ``second`` on: sums over BLOCK features are added up."""
    k = tl.arange(0, BK)[None, :]
    rows = (first + tl.arange(0, BM)).to(tl.int64)[:, None]
    others = (second + tl.arange(0, BM)).to(tl.int64)[:, None]
    left, right = x + rows * stride_m + k * stride_k, x + others * stride_m + k * stride_k
    total = tl.zeros((BM, BM), tl.float32)
    part = tl.zeros((BM, BM), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(left + start * stride_k, mask=(rows < M) & (start + k < K), other=0.0)
        b = tl.load(right + start * stride_k, mask=(others < M) & (start + k < K), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        part = tl.dot(a, tl.trans(b), part, input_precision=PRECISION)
        is_full = (start + BK) % BLOCK == 0
        total = tl.where(is_full, total + part, total)
        part = tl.where(is_full, 0.0, part)
    return total + part


@triton.jit
def tile_of(M, BM: tl.constexpr):
    """Of a program: its example, and the first rows of its two sides."""
    tiles = tl.cdiv(M, BM)
    program = tl.program_id(0)
    return (program // (tiles * tiles)).to(tl.int64), program // tiles % tiles * BM, program % tiles * BM


@triton.jit
def leave_out(sq, magnitude):
    """Below the diagonal, what another tile counts twice."""
    tl.store(sq + tl.program_id(0), 0.0)
    tl.store(magnitude + tl.program_id(0), 0.0)


@triton.jit
def add_up(products, first, second, sq, magnitude, BM: tl.constexpr):
    """Store the sum of ``products``, twice above the diagonal, and on it the sum of the roots of those of a row with
    itself.
    """
    on_diagonal = first == second
    total = tl.sum(products)
    tl.store(sq + tl.program_id(0), tl.where(on_diagonal, total, 2 * total))
    same = tl.arange(0, BM)[:, None] == tl.arange(0, BM)[None, :]
    roots = tl.sum(tl.where(same, tl.sqrt_rn(tl.maximum(products, 0.0)), 0.0))
    tl.store(magnitude + tl.program_id(0), tl.where(on_diagonal, roots, 0.0))


@triton.jit
def gram(
    a, a_strides, D, gs, g_strides, Ps, M, sq, magnitude,
    BM: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strides: of examples, rows, features."""
    i, first, second = tile_of(M, BM)
    if first > second:
        leave_out(sq, magnitude)
    else:
        of_a = inner_products(a + i * a_strides[0], a_strides[1], a_strides[2], M, D, first, second,
                              BM, BK, BLOCK, UPCAST, PRECISION)  # fmt: skip
        of_g = tl.zeros((BM, BM), tl.float32)
        for l in tl.static_range(len(gs)):
            strides = g_strides[l]
            of_g += inner_products(gs[l] + i * strides[0], strides[1], strides[2], M, Ps[l], first, second,
                                   BM, BK, BLOCK, UPCAST, PRECISION)  # fmt: skip
        add_up(of_a * of_g, first, second, sq, magnitude, BM)


def per_example_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``G [B, P, D]``, and ``|G_i|^2 [B]`` of the numbers stored."""
    a, g = channels_last(a, 2), channels_last(g, 2)

    def cut(count: int) -> Gradients:
        return Gradients(of_linear(*(t.unflatten(1, (count, -1)).flatten(0, 1) if count > 1 else t for t in (a, g))))

    grads, sq = stored(cut, a.shape[1])
    return grads.view(len(a), g.shape[2], a.shape[2]), sq


def sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """``|G_i|^2 [B]``, float64; no ``G_i`` is stored."""
    return _gradients(a, g).sq_norms()


def clipped_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [P, D]`` of the very ``G_i`` that the others measure."""
    return _gradients(a, g).clipped_sum(w).view(g.shape[2], a.shape[2])


def gram_sq_norms(a: Tensor, *gs: Tensor) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]``, and the bound on its rounding error ``[B]``, as the reference."""
    a, gs = channels_last(a, 2), tuple(channels_last(g, 2) for g in gs)
    found = [_gram_sq_norms(a, gs[i : i + AT_ONCE]) for i in range(0, len(gs), AT_ONCE)]
    sq, bound = (torch.stack(numbers).sum(0) for numbers in zip(*found, strict=True))
    return sq, bound


def _gram_sq_norms(a: Tensor, gs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    examples, m, d = a.shape
    launch = launch_of(a, *gs)
    tiles = blocks(m, launch.m) ** 2
    sq, magnitude = a.new_empty((2, examples, tiles), dtype=torch.float32)
    if examples * tiles:
        gram[(examples * tiles,)](
            a,
            a.stride(),
            d,
            gs,
            tuple(g.stride() for g in gs),
            tuple(g.shape[2] for g in gs),
            m,
            sq,
            magnitude,
            **constants(launch, a.dtype),
        )
    outputs = [g.shape[2] for g in gs]
    error = gram_bound(d, max(outputs), launch.m, additions=len(gs))
    of_g = torch.stack([lengths(g) for g in gs]).norm(dim=0)
    return bounded(sq, magnitude, error, partial(gram_lost, d, sum(outputs), lengths(a), of_g))


def constants(launch: GramLaunch, dtype: torch.dtype) -> dict[str, Any]:
    """Of a launch of Gram tiles."""
    return {
        "BM": launch.m,
        "BK": launch.k,
        "BLOCK": BLOCK,
        "UPCAST": UPCAST,
        "PRECISION": precision(dtype),
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "maxnreg": registers(launch.warps),
    }


def bounded(sq: Tensor, magnitude: Tensor, error: float, lost: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``add_up`` has stored, added up, and the bound on its error; lost: what vanishes, by the magnitude."""
    length = magnitude.sum(1, dtype=torch.float64)
    return sq.sum(1, dtype=torch.float64), error * length.square() + lost(length)


def lengths(t: Tensor) -> Tensor:
    """``|t_m| [B, M]`` of ``[B, M, D]``."""
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32)


def _gradients(a: Tensor, g: Tensor) -> Gradients:
    return Gradients(of_linear(channels_last(a, 2), channels_last(g, 2)))
