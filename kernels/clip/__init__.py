"""Clip factors from squared norms, and the clipped sum of stored per-example gradients.

Shapes: ``sq [B]`` squared norms over all parameters, ``w [B]`` factors, ``grads [B, ...]`` gradients of one parameter,
any strides. Cost: one read of ``grads`` each; both are bound by memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.clip import reference
from dpfast.kernels.dispatch import Backend, choose, expect, implementation
from dpfast.kernels.registry import register

__all__ = ["clip_factors", "clipped_sum", "clipped_sums", "sq_norms"]


def clip_factors(sq: Tensor, max_grad_norm: float, *, stability: float | None = None) -> Tensor:
    """``w_i = min(1, C / sqrt(sq_i)) [B]`` in the dtype of ``sq``, and 0 where ``sq_i`` is no square (not finite,
    negative): such an example contributes nothing.

    stability: gamma > 0 of automatic clipping (Bu et al., arXiv 2206.07136, AUTO-S times C): ``w_i = C / (sqrt(sq_i) +
        gamma)``, which scales short gradients up. Either way ``w_i sqrt(sq_i) <= C``.
    """
    if stability is not None and not stability > 0:
        expect("clip", [f"stability={stability!r}: expected a positive number, or None"], sq=sq)
    return _clip_factors(sq, max_grad_norm, stability)


def sq_norms(grads: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``|G_i|^2`` in float64, ``[B]``, without a copy of gradients that lie dense in memory in some order."""
    flat, _ = _in_memory_order(grads)
    return _sq_norms(flat, backend)


def clipped_sum(grads: Tensor, w: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``sum_i w_i G_i``; an example with ``w_i = 0`` contributes exactly 0, whatever its values."""
    expect("clip", [] if w.shape == grads.shape[:1] else ["expected grads [B, ...] and w [B]"], grads=grads, w=w)
    flat, order = _in_memory_order(grads)
    (total,) = _clipped_sums([flat], w, backend)
    inverse = [order.index(dim) for dim in range(1, grads.ndim)]
    return total.view([grads.shape[dim] for dim in order]).permute(inverse)


def clipped_sums(flats: Sequence[Tensor], w: Tensor, *, backend: Backend | None = None) -> list[Tensor]:
    """``sum_i w_i G_i [n]`` of the gradients ``[B, n]`` of several parameters, in one call."""
    for flat in flats:
        if flat.ndim != 2 or w.shape != flat.shape[:1]:
            expect("clip", ["expected gradients [B, n] and w [B]"], gradients=flat, w=w)
    return _clipped_sums(list(flats), w, backend) if flats else []


def _in_memory_order(grads: Tensor) -> tuple[Tensor, list[int]]:
    """``[B, n]``, an example's numbers as they lie in memory (no copy if dense), and the order of dimensions."""
    order = sorted(range(1, grads.ndim), key=grads.stride, reverse=True)
    return grads.permute(0, *order).unsqueeze(-1).flatten(1), order


def _implementation(backend: Backend | None, *flats: Tensor) -> Any:
    if not all(flat.shape[1] < 2 or flat.stride(1) == 1 for flat in flats):
        return reference
    return implementation(__name__, choose(backend, *flats, native=(torch.float32,), triton=(torch.float32,)))


def _fake_clip_factors(sq: Tensor, _c: float, _gamma: float | None) -> Tensor:
    return torch.empty_like(sq, dtype=torch.result_type(sq, 1.0))


def _run_sq_norms(flat: Tensor, backend: Backend | None) -> Tensor:
    sq: Tensor = _implementation(backend, flat).sq_norms(flat)
    return sq


def _fake_sq_norms(flat: Tensor, _: Backend | None) -> Tensor:
    return flat.new_empty(flat.shape[0], dtype=torch.float64)


def _run_clipped_sums(flats: list[Tensor], w: Tensor, backend: Backend | None) -> list[Tensor]:
    totals: list[Tensor] = _implementation(backend, *flats).clipped_sums(flats, w)
    return totals


def _fake_clipped_sums(flats: list[Tensor], _w: Tensor, _: Backend | None) -> list[Tensor]:
    return [flat.new_empty(flat.shape[1]) for flat in flats]


_clip_factors = register(
    "clip_factors(Tensor sq, float max_grad_norm, float? stability) -> Tensor",
    reference.clip_factors,
    _fake_clip_factors,
)
_sq_norms = register("clip_sq_norms(Tensor flat, str? backend) -> Tensor", _run_sq_norms, _fake_sq_norms)
_clipped_sums = register(
    "clip_clipped_sums(Tensor[] flats, Tensor w, str? backend) -> Tensor[]", _run_clipped_sums, _fake_clipped_sums
)
