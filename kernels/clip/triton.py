"""``clip`` on a GPU, in Triton: one pass over memory each, the sums of all parameters in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.launch import blocks, padded

NUMBERS = 4096  # that a program adds up, of one example (squares) or of every example (sums)
WARPS = 8


@triton.jit
def squares(flat, stride, n, parts, BLOCK: tl.constexpr):
    programs = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    i = (program // programs).to(tl.int64)
    at = program % programs * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(flat + i * stride + at, mask=at < n, other=0.0)
    tl.store(parts + program, tl.sum(x * x))


@triton.jit
def weighted_sums(table, tensors, w, examples, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Table ``[tensors, 5]``: first program; pointer, numbers and stride of ``[B, n]``; pointer of the sum ``[n]``."""
    program = tl.program_id(0)
    low, high = 0, tensors
    for _ in tl.static_range(STEPS):  # the last tensor whose first program is not behind this one
        middle = (low + high) // 2
        is_later = tl.load(table + middle * 5) > program
        low, high = tl.where(is_later, low, middle), tl.where(is_later, middle, high)
    table += low * 5
    flat = tl.load(table + 1).to(tl.pointer_type(tl.float32))
    n, stride = tl.load(table + 2), tl.load(table + 3)
    out = tl.load(table + 4).to(tl.pointer_type(tl.float32))
    at = (program - tl.load(table)) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(examples):
        weight = tl.load(w + i)
        x = tl.load(flat + i * stride + at, mask=at < n, other=0.0)
        total += tl.where(weight > 0, weight * x, 0.0)
    tl.store(out + at, total, mask=at < n)


def sq_norms(flat: Tensor) -> Tensor:
    """``|G_i|^2 [B]``, float64, of ``[B, n]`` whose rows lie dense in memory."""
    examples, n = flat.shape
    parts = flat.new_empty((examples, blocks(n, NUMBERS)), dtype=torch.float32)
    if parts.numel():
        squares[(parts.numel(),)](flat, flat.stride(0), n, parts, BLOCK=NUMBERS, num_warps=WARPS)
    return parts.sum(1, dtype=torch.float64)


def clipped_sums(flats: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """``sum_i w_i G_i [n]`` of each of some such ``[B, n]``; an example with ``w_i = 0`` contributes exactly 0."""
    sums = [flat.new_empty(flat.shape[1]) for flat in flats]
    rows, programs = [], 0
    for flat, out in zip(flats, sums, strict=True):
        if out.numel():
            rows.append((programs, flat.data_ptr(), flat.shape[1], flat.stride(0), out.data_ptr()))
            programs += blocks(flat.shape[1], NUMBERS)
    if rows:
        table = torch.tensor(rows, dtype=torch.int64).to(w.device, non_blocking=True)  # nobody waits for the GPU
        steps = padded(len(rows)).bit_length()
        weights = w.float().contiguous()
        weighted_sums[(programs,)](table, len(rows), weights, len(w), BLOCK=NUMBERS, STEPS=steps, num_warps=WARPS)
    return sums
