"""``keyed`` on a GPU, in Triton: a program makes some blocks of a row."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.box_muller import box_muller
from dpfast.kernels.launch import blocks, padded

BLOCKS = 256  # of a row, at most, in a program
WARPS = 4


@triton.jit
def philox(out, ids, rows, count, table, BLOCKS: tl.constexpr, NORMAL: tl.constexpr):
    """Table ``[4]``: first row, step, the words of the key."""
    parts = tl.cdiv(count, 4 * BLOCKS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    block = tl.program_id(0) % parts * BLOCKS + tl.arange(0, BLOCKS)
    none = tl.zeros((BLOCKS,), tl.uint64)
    low = none + 0xFFFFFFFF
    c0 = block.to(tl.uint64)
    c1 = (none + tl.load(ids + row // rows).to(tl.uint64)) & low
    c2 = none + tl.load(table + 1).to(tl.uint64)
    c3 = none + (tl.load(table) + row % rows).to(tl.uint64)
    k0, k1 = none + tl.load(table + 2).to(tl.uint64), none + tl.load(table + 3).to(tl.uint64)
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & low, (first >> 32) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    if NORMAL:
        x0, x1 = box_muller((c0 + 1).to(tl.float64) * 2.0**-32, c1.to(tl.float64) * 2.0**-32)
        x2, x3 = box_muller((c2 + 1).to(tl.float64) * 2.0**-32, c3.to(tl.float64) * 2.0**-32)
    else:
        x0, x1 = (c0 >> 8).to(tl.float32) * 2.0**-24, (c1 >> 8).to(tl.float32) * 2.0**-24
        x2, x3 = (c2 >> 8).to(tl.float32) * 2.0**-24, (c3 >> 8).to(tl.float32) * 2.0**-24
    at = 4 * block
    out += row * count
    tl.store(out + at, x0, mask=at < count)
    tl.store(out + at + 1, x1, mask=at + 1 < count)
    tl.store(out + at + 2, x2, mask=at + 2 < count)
    tl.store(out + at + 3, x3, mask=at + 3 < count)


def fill(out: Tensor, ids: Tensor, rows: int, first: int, step: int, key: Sequence[int], normal: bool) -> None:
    """``out [B * rows, count]``."""
    count = out.shape[1]
    size = min(BLOCKS, max(32, padded(blocks(count, 4))))
    table = torch.tensor([first, step, *key], dtype=torch.int64, device="cpu").to(ids.device, non_blocking=True)
    philox[(len(out) * blocks(count, 4 * size),)](
        out, ids, rows, count, table, BLOCKS=size, NORMAL=normal, num_warps=WARPS if size > 32 else 1
    )
