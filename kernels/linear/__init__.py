"""Per-example weight gradients of a linear map, their squared norms and their clipped sum.

Shapes: ``a [B, M, D]`` inputs and ``g [B, M, P]`` output gradients of B examples, each with M rows (augmentations times
positions). ``G_i = sum_m g[i,m] (x) a[i,m]`` is ``[P, D]``.

    per_example_grads   2 B M D P FLOPs      writes B D P numbers, the norms in the same pass
    sq_norms            2 B M D P FLOPs      nothing stored
    gram_sq_norms       2 B M^2 (D + P)      two [M, M] matrices per example; P counts all maps of one input
    clipped_sum         2 B M D P FLOPs      of the very G_i that are measured, one at a time
    weighted_sum        2 B M D P FLOPs      one matrix product, which rounds w g: for what a Gram has measured

On the CPU ``native`` computes float32 and bfloat16 (all but the Gram), on a GPU ``triton`` these and float16, PyTorch
the rest.
"""

from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.chunks import bytes_alive, in_chunks
from dpfast.kernels.conv.launches import LEAST
from dpfast.kernels.dispatch import NATIVE_DTYPES, TRITON_DTYPES, Backend, choose, expect, expected, implementation
from dpfast.kernels.linear import reference
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["clipped_sum", "gram_sq_norms", "per_example_grads", "sq_norms", "weighted_sum"]


def per_example_grads(a: Tensor, g: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """``G [B, P, D]`` and ``|G_i|^2 [B]`` of the numbers stored."""
    _check(a, g)
    return _per_example_grads(a, g, backend)


def sq_norms(a: Tensor, g: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``|G_i|^2 [B]``, float64, of the ``G_i`` that ``clipped_sum`` adds up; none is stored."""
    _check(a, g)
    return _sq_norms(a, g, backend)


def gram_sq_norms(a: Tensor, *g: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Gram matrices, and the bound on its rounding error ``[B]``.

    Several ``g [B, M, P]``, each with its own P, are of linear maps with one input (queries, keys and values): the
    squared norms are of all their gradients together, and the Gram of ``a`` is made once.
    """
    for each in g:
        _check(a, each)
    return _gram_sq_norms(a, list(g), backend)


def clipped_sum(a: Tensor, g: Tensor, w: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``sum_i w_i G_i [P, D]``; an example with ``w_i = 0`` contributes exactly 0, whatever it holds."""
    _check(a, g, w)
    return _clipped_sum(a, g, w, backend)


def weighted_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """The same from one matrix product, where that is faster: rounding may differ from what was measured."""
    _check(a, g, w)
    return _weighted_sum(a, g, w)


def _check(a: Tensor, g: Tensor, w: Tensor | None = None) -> None:
    if a.ndim > 2 and a.shape[:-1] == g.shape[:-1] and (w is None or w.shape == a.shape[:1]):
        return
    given = {"a": a, "g": g} | ({} if w is None else {"w": w})
    expect("linear", ["expected a [B, M, D], g [B, M, P] and, for sums, w [B]"], **given)


def _implementation(backend: Backend | None, a: Tensor, g: Tensor) -> Any:
    fits = backend is not None or (a.dtype == g.dtype and a.ndim == 3)
    chosen = choose(backend, a, g, native=NATIVE_DTYPES, triton=TRITON_DTYPES) if fits else "reference"
    return implementation(__name__, chosen)


def _run_per_example_grads(a: Tensor, g: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor]:
    grads, sq = _implementation(backend, a, g).per_example_grads(a, g)
    return grads, sq


def _fake_per_example_grads(a: Tensor, g: Tensor, _: Backend | None) -> tuple[Tensor, Tensor]:
    grads = a.new_empty((a.shape[0], g.shape[2], a.shape[2]), dtype=accumulation_dtype(a, g))
    return grads, a.new_empty(a.shape[0], dtype=torch.float64)


def _run_sq_norms(a: Tensor, g: Tensor, backend: Backend | None) -> Tensor:
    sq: Tensor = _implementation(backend, a, g).sq_norms(a, g)
    return sq


def _fake_sq_norms(a: Tensor, g: Tensor, _: Backend | None) -> Tensor:  # noqa: ARG001
    return a.new_empty(a.shape[0], dtype=torch.float64)


def _run_gram_sq_norms(a: Tensor, gs: list[Tensor], backend: Backend | None) -> tuple[Tensor, Tensor]:
    if _is_triton(a, gs, backend):
        sq, bound = implementation(__name__, "triton").gram_sq_norms(a, *gs)
        return sq, bound
    return in_chunks(_gram_bytes(a, gs), len(a), lambda of: reference.gram_sq_norms(a[of], *[g[of] for g in gs]))


def _is_triton(a: Tensor, gs: list[Tensor], backend: Backend | None) -> bool:
    """Whether Triton's kernel computes a Gram, which it does not keep; of one row torch does it better."""
    fits = a.ndim == 3 and all(g.dtype == a.dtype for g in gs)
    chosen = choose(backend, a, *gs, native=NATIVE_DTYPES, triton=TRITON_DTYPES) if fits or backend else "reference"
    return chosen == "triton" and a.shape[1] > 1


def _gram_bytes(a: Tensor, gs: list[Tensor]) -> int:
    """Of one example's Grams and their product, or the next Gram."""
    return 3 * a.shape[1] ** 2 * accumulation_dtype(a, *gs).itemsize


def _gram_scratch(a: Tensor, gs: list[Tensor], _: Backend | None) -> int:
    if expected(a, *gs, triton=TRITON_DTYPES) == "triton":
        return 0
    return bytes_alive(_gram_bytes(a, gs), len(a))


def _fake_gram_sq_norms(a: Tensor, _gs: list[Tensor], _: Backend | None) -> tuple[Tensor, Tensor]:
    sq = a.new_empty(a.shape[0], dtype=torch.float64)
    return sq, torch.empty_like(sq)


def _native_scratch(a: Tensor, g: Tensor, *rest: Any) -> int:
    if expected(a, g, native=NATIVE_DTYPES, triton=TRITON_DTYPES) != "native":
        return 0
    return int(implementation(__name__, "native").scratch_bytes(a, g, weighted=isinstance(rest[0], Tensor)))


def _run_clipped_sum(a: Tensor, g: Tensor, w: Tensor, backend: Backend | None) -> Tensor:
    total: Tensor = _implementation(backend, a, g).clipped_sum(a, g, w)
    return total


def _run_weighted_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """On a GPU, float32 takes too long where half precision will do."""
    if _is_triton(a, [g], None) and a.shape[1] >= LEAST:
        return _run_clipped_sum(a, g, w, "triton")
    return reference.weighted_sum(a, g, w)


def _fake_clipped_sum(a: Tensor, g: Tensor, _w: Tensor, _: Backend | None = None) -> Tensor:
    return a.new_empty((g.shape[2], a.shape[2]), dtype=accumulation_dtype(a, g))


_per_example_grads = register(
    "linear_per_example_grads(Tensor a, Tensor g, str? backend) -> (Tensor, Tensor)",
    _run_per_example_grads,
    _fake_per_example_grads,
    _native_scratch,
)
_sq_norms = register(
    "linear_sq_norms(Tensor a, Tensor g, str? backend) -> Tensor", _run_sq_norms, _fake_sq_norms, _native_scratch
)
_gram_sq_norms = register(
    "linear_gram_sq_norms(Tensor a, Tensor[] gs, str? backend) -> (Tensor, Tensor)",
    _run_gram_sq_norms,
    _fake_gram_sq_norms,
    _gram_scratch,
)
_clipped_sum = register(
    "linear_clipped_sum(Tensor a, Tensor g, Tensor w, str? backend) -> Tensor",
    _run_clipped_sum,
    _fake_clipped_sum,
    _native_scratch,
)
_weighted_sum = register(
    "linear_weighted_sum(Tensor a, Tensor g, Tensor w) -> Tensor", _run_weighted_sum, _fake_clipped_sum
)
