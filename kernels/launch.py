"""What all Triton kernels need to know of where they run: a GPU, or Triton's interpreter (``TRITON_INTERPRET=1``)."""

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from dpfast.kernels.precision import gram_error, vanished

INTERPRETED: bool = triton.knobs.runtime.interpret
FETCHED = 160_000  # bytes of shared memory: more than any launch by descriptors takes
UPCAST = INTERPRETED  # its bfloat16 arithmetic is wrong: numbers become float32 as soon as they are loaded


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter runs one program after another."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the tensor memory accelerator is there, and memory for the tiles that it fetches (Hopper, Blackwell)."""
    if INTERPRETED:
        return True
    of: Any = torch.cuda.get_device_properties(device)
    return bool(of.major >= 9 and of.shared_memory_per_block_optin >= FETCHED)


def precision(dtype: torch.dtype) -> str:
    """Of products: float32 in three products of TF32 each, which err by 2^-22; half precision is exact in float32."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def registers(warps: int) -> int:
    """Of a thread, at most: without being told, the assembler rather keeps a few numbers in memory."""
    return min(255, 65536 // (32 * warps))


def padded(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """That hold n numbers."""
    return math.ceil(n / size)


def gram_bound(d: int, p: int, tile: int, additions: int = 0) -> float:
    """``gram_error`` of tiles whose products are added up in a tree.

    Matrix units cut off where processors round, after moving products to a common exponent: four roundings instead of
    one for each product.
    """
    return 4 * gram_error(d, p, torch.float32, steps=additions + 2 * tile.bit_length())


def gram_lost(d: int, p: int, of_a: Tensor, of_g: Tensor, magnitude: Tensor) -> Tensor:
    """What numbers below the smallest normal one u add to that error (``precision.vanished``), products and operands.

    magnitude: ``sum_t |a_t| |g_t| [B]``. Of a float32 number, the part that TF32 leaves over may vanish, so that an
    inner product of n errs by another ``u sqrt(n) (|a_t| + |a_s|)``: in all by ``2 u magnitude (sqrt(D) sum_t |g_t| +
    sqrt(P) sum_t |a_t|)``.
    """
    tiny = torch.finfo(torch.float32).tiny
    sum_a, sum_g = (t.sum(-1, dtype=torch.float64) for t in (of_a, of_g))
    parts = 2 * tiny * magnitude * (math.sqrt(d) * sum_g + math.sqrt(p) * sum_a)
    # What is nowhere looked at may be infinite, and its sum times 0 not a number: a bound is.
    return (vanished(d, p, of_a, of_g, torch.float32) + parts).nan_to_num(nan=math.inf, posinf=math.inf)
