"""Per-example weight gradients of convolutions (1-d to 3-d, plain and transposed), their norms and clipped sum.

Shapes: input ``a [N, Cin, *space]``, output gradient ``g [N, Cout, *out]``, ``N = B * R`` rows, R consecutive rows
per example. ``ConvSpec`` holds the geometry. With patches of the input a convolution is a linear map per group
(``D = Cin/groups * taps``, ``M = R * positions``), so the forms and costs are those of ``dpfast.kernels.linear``.
A transposed convolution is the same with the roles of input and output gradient exchanged.

Any strides and memory formats; bfloat16 and float16 are computed in float32. Patches of a few examples at a time are
in memory.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.kernels.conv import channels_last, library, reference
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.precision import accumulation_dtype

__all__ = ["ConvSpec", "clipped_sum", "direct_sq_norms", "each_grad", "gram_sq_norms", "per_example_grads"]

PATCH_BYTES = 1 << 25  # patches alive at a time: more would leave the last-level cache
LIBRARY_FLOPS = 5e6  # per example; above, a call to oneDNN beats patches (13.7 against 13.1 ms at 3.5e6, one core)

clipped_sum = library.clipped_sum
each_grad = library.each_grad


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``G [B, *weight_shape]``: from patches, or from one library call per example where that is faster."""
    if _flops(a, g, spec, examples) <= LIBRARY_FLOPS:
        parts = [
            channels_last.per_example_grads(a[part], g[part], spec, n) for part, n in _chunks(a, g, spec, examples)
        ]
        if parts:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
    out = a.new_empty((examples, *spec.weight_shape), dtype=accumulation_dtype(a, g))
    for i, grad in enumerate(library.each_grad(a, g, spec, examples)):
        out[i] = grad
    return out


def direct_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``|G_i|^2 [B]`` with one ``G_i`` alive at a time."""
    norms = [grad.square().sum() for grad in library.each_grad(a, g, spec, examples)]
    return torch.stack(norms) if norms else a.new_zeros(0, dtype=accumulation_dtype(a, g))


def gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Gram matrices of patches, and the bound on its rounding error ``[B]``."""
    empty = a.new_zeros(0, dtype=accumulation_dtype(a, g))
    parts = [
        reference.gram_sq_norms(a[rows], g[rows], spec, count) for rows, count in _chunks(a, g, spec, examples)
    ] or [(empty, empty)]
    return torch.cat([sq for sq, _ in parts]), torch.cat([bound for _, bound in parts])


def _chunks(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Iterator[tuple[slice, int]]:
    """Rows of a few examples at a time, and how many examples they are."""
    if examples == 0:
        return
    rows = a.shape[0] // examples
    patch_numbers = _positions(a, g, spec) * rows * math.prod(spec.weight_shape[1:]) * spec.groups
    step = max(1, PATCH_BYTES // max(1, patch_numbers * accumulation_dtype(a, g).itemsize))
    for start in range(0, examples, step):
        stop = min(start + step, examples)
        yield slice(start * rows, stop * rows), stop - start


def _positions(a: Tensor, g: Tensor, spec: ConvSpec) -> int:
    return math.prod((a if spec.transposed else g).shape[2:])


def _flops(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> float:
    """Of one example's weight gradient."""
    return 2 * _positions(a, g, spec) * (a.shape[0] / max(examples, 1)) * math.prod(spec.weight_shape)
