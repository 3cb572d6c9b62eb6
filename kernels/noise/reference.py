"""The formulas of ``noise``, with numpy on the CPU, whatever the device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_BLOCKS = 1 << 14  # at a time


def chacha20(key: Sequence[int], counters: NDArray[np.uint32], nonce: Sequence[int] = (0, 0, 0)) -> NDArray[np.uint32]:
    """Blocks ``[16, len(counters)]`` of the stream (RFC 8439, section 2.3). key, nonce: eight and three words."""
    first = np.empty((16, len(counters)), dtype=np.uint32)
    first[12] = counters
    for rows, words in ((slice(4), _CONSTANTS), (slice(4, 12), key), (slice(13, 16), nonce)):
        first[rows] = np.array(words, dtype=np.uint32)[:, None]
    x = first.copy()
    for _ in range(10):
        for shift in (0, 1):  # columns, diagonals
            a, b, c, d = (np.roll(x[4 * i : 4 * i + 4], -i * shift, axis=0) for i in range(4))
            for by, other in ((16, 12), (8, 7)):
                a = a + b
                d = _turned(d ^ a, by)
                c = c + d
                b = _turned(b ^ c, other)
            x = np.concatenate([np.roll(rows, i * shift, axis=0) for i, rows in enumerate((a, b, c, d))])
    return x + first


def _turned(x: NDArray[np.uint32], by: int) -> NDArray[np.uint32]:
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def normal(key: Sequence[int], first: int, blocks: int) -> NDArray[np.float64]:
    """Standard normal numbers ``[8, blocks]`` of as many blocks of the stream from number ``first`` on."""
    words = chacha20(key, np.arange(first, first + blocks, dtype=np.uint64).astype(np.uint32)).astype(np.uint64)
    upper = (words[1::2] << np.uint64(20)) | (words[::2] >> np.uint64(12))
    uniform = (np.uint64(1 << 52) - upper).astype(np.float64) * 2.0**-52
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:4])), 2.0 * np.pi * uniform[4:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def noised(x: Tensor, out: Tensor, scale: float, divisor: float, grid: float, key: Sequence[int]) -> None:
    """Into ``out [n]``."""
    n = len(x)
    blocks = -(-n // 8)
    for first in range(0, blocks, _BLOCKS):
        count = min(_BLOCKS, blocks - first)
        for j, z in enumerate(torch.from_numpy(normal(key, first, count))):
            at = j * blocks + first
            some, numbers = slice(at, at + count), z[: max(0, n - at)].to(x.device)
            out[some] = (_on_grid(x[some].double(), grid) + _on_grid(scale * numbers, grid)) / divisor


def _on_grid(x: Tensor, grid: float) -> Tensor:
    return torch.round(x / grid) * grid if grid else x
