"""Per-example gradients of a group norm's affine parameters, from the input of the norm.

    weight[b, c] = sum_{m,s} x_hat[b, m, c, s] * g[b, m, c, s]    x_hat = (x - mean) / sqrt(var + eps), by row and group
    bias[b, c]   = sum_{m,s} g[b, m, c, s]

Shapes: x (what is normalised) and g (the output gradient) are [N, C, *space], N = B * M rows of B examples. An instance
norm has C groups. Cost: one read of x and g by the native backend; the reference normalises first.
"""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, Backend, choose
from dpfast.kernels.norm import native, reference
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["group_norm_grads"]


def group_norm_grads(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients ``(weight, bias)`` of every example, each [B, C], float32 at least.

    Native for float32 and bfloat16 on the CPU.
    """
    return _group_norm_grads(x, g, groups, eps, examples, backend)


def _run(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor]:
    fits = backend is not None or x.dtype == g.dtype
    is_native = fits and choose(backend, x, g, dtypes=tuple(NATIVE_DTYPES)) == "native"
    return (native if is_native else reference).group_norm_grads(x, g, groups, eps, examples)


def _fake(x: Tensor, g: Tensor, _groups: int, _eps: float, examples: int, _: Backend | None) -> tuple[Tensor, Tensor]:
    weight = x.new_empty((examples, x.shape[1]), dtype=accumulation_dtype(x, g))
    return weight, torch.empty_like(weight)


_group_norm_grads = register(
    "group_norm_grads(Tensor x, Tensor g, int groups, float eps, int examples, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
