"""The backward pass of a group norm, with the gradients of its affine parameters per example.

    weight[b, c] = sum_{m,s} x_hat[b, m, c, s] * g[b, m, c, s]    x_hat = (x - mean) / sqrt(var + eps), by row and group
    bias[b, c]   = sum_{m,s} g[b, m, c, s]

Shapes: x (what is normalised) and g (the output gradient) are [N, C, *space], N = B * M rows of B examples. An instance
norm has C groups. The gradient of x needs the same sums, so that the native backend gives all three for one read of x
and g; the reference normalises first.
"""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, Backend, choose, would_be_native
from dpfast.kernels.norm import native, reference
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["backward_is_native", "group_norm_backward", "group_norm_grads"]


def group_norm_grads(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients ``(weight, bias)`` of every example, each [B, C], float32 at least.

    Native for float32 and bfloat16 on the CPU.
    """
    return _group_norm_grads(x, g, groups, eps, examples, backend)


def group_norm_backward(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    groups: int,
    eps: float,
    examples: int,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``x``, of its shape and dtype, and those of ``group_norm_grads``. weight: of the norm, ``[C]``.

    Native for float32 and bfloat16 on the CPU, with a weight of float32.
    """
    return _group_norm_backward(x, g, weight, groups, eps, examples, backend)


def backward_is_native(x: Tensor, weight: Tensor | None) -> bool:
    """Whether ``group_norm_backward`` is native, for gradients like ``x``: otherwise torch's is the faster one."""
    return would_be_native(x) and (weight is None or (weight.dtype == torch.float32 and would_be_native(weight)))


def _is_native(x: Tensor, g: Tensor, weight: Tensor | None, backend: Backend | None) -> bool:
    if backend is None and (x.dtype != g.dtype or not (weight is None or backward_is_native(x, weight))):
        return False
    return choose(backend, x, g, dtypes=tuple(NATIVE_DTYPES)) == "native"


def _grads(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor]:
    kernel = native if _is_native(x, g, None, backend) else reference
    return kernel.group_norm_grads(x, g, groups, eps, examples)


def _backward(
    x: Tensor, g: Tensor, weight: Tensor | None, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = native if _is_native(x, g, weight, backend) else reference
    return kernel.group_norm_backward(x, g, weight, groups, eps, examples)


def _fake_grads(
    x: Tensor, g: Tensor, _groups: int, _eps: float, examples: int, _: Backend | None
) -> tuple[Tensor, Tensor]:
    weight = x.new_empty((examples, x.shape[1]), dtype=accumulation_dtype(x, g))
    return weight, torch.empty_like(weight)


def _fake_backward(
    x: Tensor, g: Tensor, _weight: Tensor | None, groups: int, eps: float, examples: int, _: Backend | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_fake_grads(x, g, groups, eps, examples, _)


_group_norm_grads = register(
    "group_norm_grads(Tensor x, Tensor g, int groups, float eps, int examples, str? backend) -> (Tensor, Tensor)",
    _grads,
    _fake_grads,
)
_group_norm_backward = register(
    "group_norm_backward(Tensor x, Tensor g, Tensor? weight, int groups, float eps, int examples, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
