"""The backward pass of a group norm, with the gradients of its affine parameters per example.

    weight[b, c] = sum_{m,s} x_hat[b, m, c, s] * g[b, m, c, s]    x_hat = (x - mean) / sqrt(var + eps), by row and group
    bias[b, c]   = sum_{m,s} g[b, m, c, s]

Shapes: x (what is normalised) and g (the output gradient) are [N, C, *space], N = B * M rows of B examples. An instance
norm has C groups. The gradient of x needs the same sums, so that the native backend gives all three for one read of x
and g; the reference normalises first.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.dispatch import (
    NATIVE_DTYPES,
    TRITON_DTYPES,
    Backend,
    choose,
    expect,
    expected,
    implementation,
)
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["backward_is_a_kernel", "group_norm_backward", "group_norm_grads"]


def group_norm_grads(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients ``(weight, bias)`` of every example, each [B, C], float32 at least.

    Native for float32 and bfloat16 on the CPU; by Triton on a GPU, where x and g may be of two dtypes.

    Raises:
        KernelError: other shapes, dtypes or devices, or ``backend="native"`` where it cannot be used.
    """
    _check(x, g, None, groups, examples)
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

    By the same kernels, with a weight of float32. Raises as ``group_norm_grads``.
    """
    _check(x, g, weight, groups, examples)
    return _group_norm_backward(x, g, weight, groups, eps, examples, backend)


def backward_is_a_kernel(x: Tensor, weight: Tensor | None) -> bool:
    """Whether ``group_norm_backward`` is a kernel for gradients like ``x``: the reference is slower than autograd."""
    return expected(x, **_DTYPES) != "reference" and (weight is None or weight.dtype == torch.float32)


def _check(x: Tensor, g: Tensor, weight: Tensor | None, groups: int, examples: int) -> None:
    problems = []
    if x.ndim < 2 or x.shape != g.shape:
        problems.append("expected x and g of one shape [N, C, *space]")
    elif groups < 1 or x.shape[1] % groups:
        problems.append(f"expected groups that divide {x.shape[1]} channels")
    elif x.shape[0] % max(1, examples):
        problems.append(f"expected examples that divide {x.shape[0]} rows")
    elif weight is not None and weight.shape != x.shape[1:2]:
        problems.append(f"expected a weight [C] = [{x.shape[1]}]")
    if not all(t.is_floating_point() and t.device == x.device for t in (x, g, weight) if t is not None):
        problems.append("expected floating dtypes, on one device")
    given = {"x": x, "g": g} | ({} if weight is None else {"weight": weight})
    expect(f"group norm of {groups} groups and {examples} examples", problems, **given)


_DTYPES: dict[Backend, Collection[torch.dtype]] = {"native": NATIVE_DTYPES, "triton": TRITON_DTYPES}


def _implementation(x: Tensor, g: Tensor, weight: Tensor | None, backend: Backend | None) -> Any:
    """Native kernels read x and g of one dtype, Triton's of any: on a GPU autocast computes norms in float32."""
    if weight is not None:
        chosen = choose(backend, weight, native=(torch.float32,), triton=(torch.float32,))
        if chosen == "reference":
            return implementation(__name__, chosen)
    if x.dtype == g.dtype or backend == "native":
        return implementation(__name__, choose(backend, x, g, **_DTYPES))
    found = {choose(backend, t, triton=TRITON_DTYPES) for t in (x, g)}
    return implementation(__name__, "triton" if found == {"triton"} else "reference")


def _grads(
    x: Tensor, g: Tensor, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor]:
    kernels = _implementation(x, g, None, backend)
    weight, bias = kernels.group_norm_grads(_flat(x), _flat(g), groups, eps, examples)
    return weight, bias


def _backward(
    x: Tensor, g: Tensor, weight: Tensor | None, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _implementation(x, g, weight, backend)
    weight = None if weight is None else weight.contiguous()
    dx, *affine = kernels.group_norm_backward(_flat(x), _flat(g), weight, groups, eps, examples)
    return dx.view(x.shape), affine[0], affine[1]


def _flat(t: Tensor) -> Tensor:
    """``[N, C, S]``; a view wherever positions are evenly spaced (contiguous, channels_last)."""
    return t.flatten(2) if t.ndim > 2 else t.unsqueeze(2)


def _fake_grads(
    x: Tensor, g: Tensor, _groups: int, _eps: float, examples: int, _backend: Backend | None
) -> tuple[Tensor, Tensor]:
    weight = x.new_empty((examples, x.shape[1]), dtype=accumulation_dtype(x, g))
    return weight, torch.empty_like(weight)


def _fake_backward(
    x: Tensor, g: Tensor, _weight: Tensor | None, groups: int, eps: float, examples: int, backend: Backend | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_fake_grads(x, g, groups, eps, examples, backend)


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
