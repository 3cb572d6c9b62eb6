"""Numbers plus Gaussian noise, from a cryptographic generator: ``(x + scale * z) / divisor``.

With a ``grid``, a power of two, x and ``scale * z`` are rounded to multiples of it before they are added (all exact).

z: independent standard normal numbers, made of the ChaCha20 stream (Bernstein 2008; RFC 8439) of a key of 256 bits by
the formula of Box and Muller (1958). With ``m = ceil(n / 8)`` blocks of the stream, each 64 bytes, ``z[j * m + b]`` of
n numbers in their order in memory is number j of block b, from 64-bit words 0 to 7:

    u_j = 1 - k / 2^52, k the upper 52 bits of word j
    r_j = sqrt(-2 log u_j),  z_j = r_j cos(2 pi u_(j+4)),  z_(j+4) = r_j sin(2 pi u_(j+4))    j = 0 .. 3

All in float64. Every backend draws the same numbers up to rounding, and whoever knows the key knows them all: a key
comes from the operating system and is used once. Cost: one read and one write of the numbers; of a core with AVX-512 or
AVX2 3 to 6 ns for each.
"""

import math
import struct
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.dispatch import Backend, choose, expect, implementation
from dpfast.kernels.registry import register

__all__ = ["KEY_BYTES", "noised"]

KEY_BYTES = 32
_DTYPES = (torch.float32, torch.float64)
_MOST = 8 << 32  # numbers: blocks are counted in 32 bits


def noised(
    x: Tensor, scale: float, divisor: float, key: bytes, *, grid: float = 0.0, backend: Backend | None = None
) -> Tensor:
    """``(x + scale * z) / divisor``, a new tensor of x's shape, dtype and order in memory.

    x: floating point, of any shape, calculated in float64.
    key: 32 bytes, for this call alone.
    grid: a power of two, to multiples of which x and ``scale * z`` are rounded first; 0: to none.

    Raises:
        KernelError: a key of another length, more numbers than a stream has, or a backend that cannot be used.
    """
    problems = [] if len(key) == KEY_BYTES else [f"expected a key of {KEY_BYTES} bytes, got {len(key)}"]
    if not x.is_floating_point():
        problems.append("expected floating-point numbers")
    if x.numel() > _MOST:
        problems.append("expected at most 2^35 numbers, as many as a stream has")
    if grid and math.frexp(grid)[0] != 0.5:
        problems.append(f"grid={grid!r}: expected a power of two, or 0")
    expect("noised", problems, x=x)
    return _noised(x, scale, divisor, grid, list(struct.unpack("<8I", key)), backend)


def _run(x: Tensor, scale: float, divisor: float, grid: float, key: list[int], backend: Backend | None) -> Tensor:
    if x.dtype not in _DTYPES:
        return _run(x.double(), scale, divisor, grid, key, backend).to(x.dtype)
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # x has gaps, or numbers in several places
        x = torch.empty_like(out).copy_(x)
    chosen = choose(backend, x, native=_DTYPES, triton=_DTYPES)
    numbers = (x, out) if chosen == "native" else (_in_memory(x), _in_memory(out))  # which needs their place alone
    implementation(__name__, chosen).noised(*numbers, scale, divisor, grid, key)
    return out


def _in_memory(t: Tensor) -> Tensor:
    """All numbers of a dense tensor, as they lie in memory."""
    return t.detach().as_strided((t.numel(),), (1,))


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_noised = register(
    "noised(Tensor x, float scale, float divisor, float grid, int[] key, str? backend) -> Tensor", _run, _fake
)
