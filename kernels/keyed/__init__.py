"""Random numbers of a counter and a key, without any state: Philox4x32-10.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter and a key to four words of
32 bits. Row ``i * R + k`` of the results is of example ``ids[i]`` and of its row ``first + k``; its block b has the
counter (b, id, step, row), and number 4 b + j of the row is made of word j:

    uniform   the upper 24 bits, times 2^-24
    normal    of words 0 and 1, and of 2 and 3, by Box and Muller (1958) in float64: at most 6.7

Both float32. Not for privacy: whoever knows the key knows all numbers. Cost: one write; of a core with AVX-512 or AVX2
1 to 6 ns for each number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.dispatch import Backend, choose, expect, implementation
from dpfast.kernels.registry import register

__all__ = ["normal", "uniform"]

_WORD = 0xFFFFFFFF


def uniform(
    ids: Tensor, rows: int, key: Sequence[int], *, step: int, count: int, first: int = 0, backend: Backend | None = None
) -> Tensor:
    """float32 ``[B * rows, count]`` in [0, 1).

    ids: int64 ``[B]``, of which 32 bits count. rows: R, of an example. key: two words of 32 bits.

    Raises:
        KernelError: other ids, or a backend that cannot be used.
    """
    return _checked(ids, rows, first, step, key, count, False, backend)


def normal(
    ids: Tensor, rows: int, key: Sequence[int], *, step: int, count: int, first: int = 0, backend: Backend | None = None
) -> Tensor:
    """The same, standard normal."""
    return _checked(ids, rows, first, step, key, count, True, backend)


def _checked(ids: Tensor, rows: int, first: int, step: int, key: Sequence[int], count: int, *rest: Any) -> Tensor:
    problems = [] if ids.dtype == torch.int64 and ids.ndim == 1 else ["expected ids int64 [B]"]
    if len(key) != 2 or not all(0 <= word <= _WORD for word in (*key, step, first, first + rows - 1)):
        problems.append("expected a key of two words, and a step and rows, of 32 bits")
    if count > 4 * (_WORD + 1):
        problems.append("expected at most 2^34 numbers of a row")
    expect("keyed", problems, ids=ids)
    return _keyed(ids, rows, first, step, list(key), count, *rest)


def _run(
    ids: Tensor, rows: int, first: int, step: int, key: list[int], count: int, normal: bool, backend: Backend | None
) -> Tensor:
    chosen = choose(backend, ids, native=(torch.int64,), triton=(torch.int64,))
    out = ids.new_empty((len(ids) * rows, count), dtype=torch.float32)
    if out.numel():
        implementation(__name__, chosen).fill(out, ids.contiguous(), rows, first, step, key, normal)
    return out


def _fake(ids: Tensor, rows: int, _first: int, _step: int, _key: list[int], count: int, *_: Any) -> Tensor:
    return ids.new_empty((len(ids) * rows, count), dtype=torch.float32)


_keyed = register(
    "keyed(Tensor ids, SymInt rows, SymInt first, SymInt step, SymInt[] key, SymInt count, bool normal, str? backend)"
    " -> Tensor",
    _run,
    _fake,
)
