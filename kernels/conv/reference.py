"""The formulas for convolutions: cut the input into patches, then a linear map."""

import math

import torch
from torch import Tensor

from dpfast.kernels.chunks import in_chunks
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.linear import reference as linear
from dpfast.kernels.precision import accumulation_dtype


def patches(x: Tensor, spec: ConvSpec, positions: torch.Size) -> Tensor:
    """``[N, C, *space] -> [N, C, *kernel, *positions]``: what each weight tap sees; a strided view."""
    x = spec.pad(x)
    dims = len(spec.kernel)
    for dim, (k, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True), start=2):
        x = x.unfold(dim, (k - 1) * dilation + 1, stride)[..., ::dilation].narrow(dim, 0, positions[dim - 2])
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


def linear_view(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """The convolution as a linear map: inputs ``[B, groups, M, D]`` and output gradients ``[B, groups, M, P]``."""
    if spec.transposed:
        a, g = g, a
    rows, positions, dtype = a.shape[0] // examples, math.prod(g.shape[2:]), accumulation_dtype(a, g)

    def split(x: Tensor) -> Tensor:
        """``[N, C, ...] -> [B, groups, R * positions, C/groups * ...]``."""
        x = x.to(dtype).reshape(examples, rows, spec.groups, -1, positions)
        return x.permute(0, 2, 1, 4, 3).flatten(2, 3)

    return split(patches(a, spec, g.shape[2:])), split(g)


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``G [B, *weight_shape]``."""
    return linear.weight_grads(*linear_view(a, g, spec, examples)).reshape(examples, *spec.weight_shape)


def gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Gram matrices of patches, and the bound on its rounding error ``[B]``."""
    return linear.gram_sq_norms(*linear_view(a, g, spec, examples))


def gram_sq_norms_in_chunks(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """The same, with the patches and Grams of a few examples alive at a time."""
    rows = a.shape[0] // max(1, examples)

    def some(of: slice) -> tuple[Tensor, Tensor]:
        own = slice(of.start * rows, of.stop * rows)
        if of.start == of.stop:
            empty = a.new_zeros(0, dtype=accumulation_dtype(a, g))
            return empty, empty
        return gram_sq_norms(a[own], g[own], spec, of.stop - of.start)

    return in_chunks(gram_bytes(a, g, spec, rows), examples, some)


def gram_bytes(a: Tensor, g: Tensor, spec: ConvSpec, rows: int) -> int:
    """Of one example's patches and Grams."""
    m = rows * math.prod((a if spec.transposed else g).shape[2:])
    numbers = m * math.prod(spec.weight_shape[1:]) + 3 * m**2
    return numbers * spec.groups * accumulation_dtype(a, g).itemsize


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i``, of the weight's shape."""
    return linear.clipped_sum(*linear_view(a, g, spec, len(w)), w).reshape(spec.weight_shape)
