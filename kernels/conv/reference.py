"""The formulas for convolutions: cut the input into patches, then a linear map."""

import math

import torch
from torch import Tensor

from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.linear import reference as linear
from dpfast.kernels.precision import accumulation_dtype

PATCH_BYTES = 1 << 25  # patches alive at a time: more would leave the last-level cache


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
    return linear.per_example_grads(*linear_view(a, g, spec, examples)).reshape(examples, *spec.weight_shape)


def gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Gram matrices of patches, and the bound on its rounding error ``[B]``."""
    return linear.gram_sq_norms(*linear_view(a, g, spec, examples))


def gram_sq_norms_in_chunks(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """The same, with the patches of a few examples alive at a time."""
    empty = a.new_zeros(0, dtype=accumulation_dtype(a, g))
    rows = a.shape[0] // max(1, examples)
    positions = math.prod((a if spec.transposed else g).shape[2:])
    numbers = positions * rows * math.prod(spec.weight_shape[1:]) * spec.groups
    step = max(1, PATCH_BYTES // max(1, numbers * empty.itemsize))
    parts = [
        gram_sq_norms(a[i * rows : (i + step) * rows], g[i * rows : (i + step) * rows], spec, min(step, examples - i))
        for i in range(0, examples, step)
    ] or [(empty, empty)]
    return torch.cat([sq for sq, _ in parts]), torch.cat([bound for _, bound in parts])


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i``, of the weight's shape."""
    return linear.clipped_sum(*linear_view(a, g, spec, len(w)), w).reshape(spec.weight_shape)
