"""The formulas of ``keyed``, on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Sequence[int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words (broadcast together); four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, by 16-bit halves: int64 would overflow on the whole."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def words(ids: Tensor, rows: int, first: int, step: int, key: Sequence[int], blocks: int) -> Tensor:
    """int64 ``[B * rows, blocks, 4]``."""
    block = torch.arange(blocks, device=ids.device).expand(len(ids) * rows, -1)
    example = (ids & _WORD).repeat_interleave(rows)[:, None]
    row = torch.arange(first, first + rows, device=ids.device).repeat(len(ids))[:, None]
    found = philox4x32((block, example, torch.full_like(row, step), row), key)
    return torch.stack([word.expand(block.shape) for word in found], dim=-1)


def fill(out: Tensor, ids: Tensor, rows: int, first: int, step: int, key: Sequence[int], normal: bool) -> None:
    """``out [B * rows, count]``."""
    found = words(ids, rows, first, step, key, -(-out.shape[1] // 4))
    if normal:
        pairs = found.unflatten(2, (2, 2)).double()
        radius = (-2.0 * ((pairs[..., 0] + 1) * 2.0**-32).log()).sqrt()
        angle = pairs[..., 1] * (2 * math.pi * 2.0**-32)
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    else:
        values = (found >> 8) * 2.0**-24
    out.copy_(values.flatten(1)[:, : out.shape[1]])
