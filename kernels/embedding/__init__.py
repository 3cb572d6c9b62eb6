"""Per-example gradients of an embedding table, their squared norms and their clipped sum.

Shapes: ``index [B, M]`` rows of the table looked up, ``g [B, M, D]`` gradients of what was looked up; the gradient
of example i is ``[V, D]`` with ``G_i[v] = sum over m with index[i,m] = v of g[i,m]``.

    per_example_grads   writes B V D numbers
    sq_norms            of the rows that were looked up, B M D numbers: no table
    gram_sq_norms       B M^2 D FLOPs, no table, and a bound on the rounding error
    clipped_sum         of the very G_i that are measured, no table
    weighted_sum        one pass over g, which rounds w g: for what a Gram has measured

On a GPU ``triton`` computes float32, bfloat16 and float16 (all but the Gram), always in the same order of additions.
PyTorch, which computes the rest, uses atomics there.
"""

from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.chunks import bytes_alive
from dpfast.kernels.dispatch import PLAIN, TRITON_DTYPES, Backend, choose, expect, expected, implementation
from dpfast.kernels.embedding import reference
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["clipped_sum", "gram_sq_norms", "per_example_grads", "sq_norms", "weighted_sum"]


def per_example_grads(index: Tensor, g: Tensor, rows: int, *, backend: Backend | None = None) -> Tensor:
    """``G [B, V, D]`` for a table of ``rows`` = V rows."""
    _check(index, g, rows)
    return _per_example_grads(index, g, rows, backend)


def sq_norms(index: Tensor, g: Tensor, rows: int, *, backend: Backend | None = None) -> Tensor:
    """``|G_i|^2 [B]``, float64, of the ``G_i`` that ``clipped_sum`` adds up."""
    _check(index, g, rows)
    return _sq_norms(index, g, rows, backend)


def gram_sq_norms(index: Tensor, g: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` without the table, and the bound on its rounding error ``[B]``."""
    _check(index, g)
    return _gram_sq_norms(index, g, backend)


def clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``sum_i w_i G_i [V, D]``; an example with ``w_i = 0`` contributes exactly 0, whatever it holds."""
    _check(index, g, rows, w)
    return _clipped_sum(index, g, rows, w, backend)


def weighted_sum(index: Tensor, g: Tensor, rows: int, w: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The same in one pass over ``g``: rounding may differ from what was measured."""
    _check(index, g, rows, w)
    return _weighted_sum(index, g, rows, w, backend)


def _check(index: Tensor, g: Tensor, rows: int | None = None, w: Tensor | None = None) -> None:
    """On a GPU nobody waits to see whether numbers are in the table: the look-up itself has asserted it."""
    problems = []
    if g.ndim != 3 or index.shape != g.shape[:2]:
        problems.append("expected index [B, M] and g [B, M, D]")
    elif w is not None and w.shape != index.shape[:1]:
        problems.append("expected w [B]")
    if index.device != g.device:
        problems.append("expected one device (move one of them)")
    if rows is not None and type(index) in PLAIN and index.device.type == "cpu" and index.numel():
        least, most = index.aminmax()
        if least < 0 or most >= rows:
            problems.append(f"expected an index of 0 to {rows - 1}")
    expect("embedding", problems, index=index, g=g, **({} if w is None else {"w": w}))


def _implementation(g: Tensor, backend: Backend | None) -> Any:
    return implementation(__name__, choose(backend, g, triton=TRITON_DTYPES))


def _run_per_example_grads(index: Tensor, g: Tensor, rows: int, backend: Backend | None) -> Tensor:
    grads: Tensor = _implementation(g, backend).per_example_grads(index, g, rows)
    return grads


def _fake_per_example_grads(index: Tensor, g: Tensor, rows: int, _: Backend | None) -> Tensor:
    return g.new_empty((index.shape[0], rows, g.shape[-1]), dtype=accumulation_dtype(g))


def _run_sq_norms(index: Tensor, g: Tensor, rows: int, backend: Backend | None) -> Tensor:
    sq: Tensor = _implementation(g, backend).sq_norms(index, g, rows)
    return sq


def _fake_sq_norms(index: Tensor, g: Tensor, _rows: int, _: Backend | None) -> Tensor:
    return g.new_empty(index.shape[0], dtype=torch.float64)


def _run_gram_sq_norms(index: Tensor, g: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor]:
    sq, bound = _implementation(g, backend).gram_sq_norms(index, g)
    return sq, bound


def _fake_gram_sq_norms(index: Tensor, g: Tensor, _: Backend | None) -> tuple[Tensor, Tensor]:
    sq = g.new_empty(index.shape[0], dtype=torch.float64)
    return sq, torch.empty_like(sq)


def _run_clipped_sum(index: Tensor, g: Tensor, rows: int, w: Tensor, backend: Backend | None) -> Tensor:
    total: Tensor = _implementation(g, backend).clipped_sum(index, g, rows, w)
    return total


def _run_weighted_sum(index: Tensor, g: Tensor, rows: int, w: Tensor, backend: Backend | None) -> Tensor:
    total: Tensor = _implementation(g, backend).weighted_sum(index, g, rows, w)
    return total


def _fake_sum(_index: Tensor, g: Tensor, rows: int, _w: Tensor, _: Backend | None) -> Tensor:
    return g.new_empty((rows, g.shape[-1]), dtype=accumulation_dtype(g))


def _scratch(index: Tensor, g: Tensor, _rows: int, *rest: Any) -> int:
    if expected(g, triton=TRITON_DTYPES) == "triton":  # five numbers of 8 bytes for a look-up, to sort it
        stored = bytes_alive(4 * index.numel(), g.shape[2]) if isinstance(rest[0], Tensor) else 0
        return 40 * index.numel() + stored
    return bytes_alive(reference.chunk_bytes(g), len(g))


_per_example_grads = register(
    "embedding_per_example_grads(Tensor index, Tensor g, int rows, str? backend) -> Tensor",
    _run_per_example_grads,
    _fake_per_example_grads,
)
_sq_norms = register(
    "embedding_sq_norms(Tensor index, Tensor g, int rows, str? backend) -> Tensor",
    _run_sq_norms,
    _fake_sq_norms,
    _scratch,
)
_gram_sq_norms = register(
    "embedding_gram_sq_norms(Tensor index, Tensor g, str? backend) -> (Tensor, Tensor)",
    _run_gram_sq_norms,
    _fake_gram_sq_norms,
)
_clipped_sum = register(
    "embedding_clipped_sum(Tensor index, Tensor g, int rows, Tensor w, str? backend) -> Tensor",
    _run_clipped_sum,
    _fake_sum,
    _scratch,
)
_weighted_sum = register(
    "embedding_weighted_sum(Tensor index, Tensor g, int rows, Tensor w, str? backend) -> Tensor",
    _run_weighted_sum,
    _fake_sum,
)
