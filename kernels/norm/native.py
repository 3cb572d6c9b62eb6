"""``norm`` on the CPU, in float32 or from bfloat16 (``csrc/cpu/norm.cpp``): x and g come from memory once."""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, native_module


def group_norm_grads(x: Tensor, g: Tensor, groups: int, eps: float, examples: int) -> tuple[Tensor, Tensor]:
    """As the reference; sums are carried in float64 and rounded once."""
    return _run(x, _alike(g, x), None, None, groups, eps, examples)


def group_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor | None, groups: int, eps: float, examples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, from the same sums."""
    dx = torch.empty_like(x)
    return dx, *_run(x, _alike(g, x), weight, dx, groups, eps, examples)


def _run(
    x: Tensor, g: Tensor, gamma: Tensor | None, dx: Tensor | None, groups: int, eps: float, examples: int
) -> tuple[Tensor, Tensor]:
    rows, channels, positions = x.shape
    weight = x.new_empty(examples, channels, dtype=torch.float32)
    bias = torch.empty_like(weight)
    native_module().group_norm_backward(
        (examples, rows // max(1, examples), groups, channels, positions),
        (x.stride(), g.stride(), x.stride() if dx is None else dx.stride()), eps, NATIVE_DTYPES[x.dtype],
        x.data_ptr(), g.data_ptr(), 0 if gamma is None else gamma.data_ptr(), 0 if dx is None else dx.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias


def _alike(g: Tensor, x: Tensor) -> Tensor:
    """``g``, copied where it does not have positions, or channels, side by side as ``x`` has: that costs a tenth."""
    fits = any(x.stride(dim) == g.stride(dim) == 1 for dim in (1, 2))
    return g if fits else torch.empty_like(x).copy_(g)
