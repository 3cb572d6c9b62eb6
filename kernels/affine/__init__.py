"""Per-example gradients of a norm's affine parameters, ``y = weight * x_hat + bias``.

    weight[b, c] = sum_{m,s} a[b, m, c, s] * g[b, m, c, s]
    bias[b, c]   = sum_{m,s} g[b, m, c, s]

Shapes: a (the normalised input x-hat) and g (the output gradient) are [B, M, C, S]: B examples, M rows of an
example, C channels, S positions of a channel. GroupNorm over [B*K, C, H, W] views as [B, K, C, H*W];
LayerNorm over [B*K, T, C] as [B, K*T, C, 1]. Strides are free: neither NCHW nor channels_last is copied.
Cost: 3 B M C S FLOPs, and one read of a and g by the native backend.
"""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, TRITON_DTYPES, Backend, choose, expect, implementation
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = ["affine_grads", "bias_grads"]


def affine_grads(a: Tensor, g: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Gradients ``(weight, bias)`` of every example, each [B, C]; not averaged over rows.

    a, g: [B, M, C, S], of one floating dtype and device, any strides.
    backend: None takes native for float32 on the CPU and Triton on a GPU (no autograd), else the reference.
    Results are float64 for float64 inputs and float32 otherwise; float16 and bfloat16 are summed in float32.

    Raises:
        KernelError: other shapes, dtypes or devices, or ``backend="native"`` where it cannot be used.
    """
    _check(a, g)
    return _affine_grads(a, g, backend)


def bias_grads(g: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Gradients of a bias, ``[B, C]``: the sum of ``g [B, M, C, S]`` over rows and positions, float32 at least."""
    expect("bias_grads", [] if g.ndim == 4 else ["expected g [B, M, C, S]"], g=g)
    return _bias_grads(g, backend)


def _check(a: Tensor, g: Tensor) -> None:
    problems = []
    if a.ndim != 4 or a.shape != g.shape:
        problems.append("expected a and g of one shape [B, M, C, S]")
    if a.dtype != g.dtype or not a.is_floating_point():
        problems.append("expected one floating dtype (cast one of them)")
    if a.device != g.device:
        problems.append("expected one device (move one of them)")
    expect("affine_grads", problems, a=a, g=g)


def _run_affine_grads(a: Tensor, g: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor]:
    chosen = choose(backend, a, g, native=(torch.float32,), triton=TRITON_DTYPES)
    weight, bias = implementation(__name__, chosen).affine_grads(a, g)
    return weight, bias


def _fake_affine_grads(a: Tensor, g: Tensor, _: Backend | None) -> tuple[Tensor, Tensor]:
    weight = a.new_empty((a.shape[0], a.shape[2]), dtype=accumulation_dtype(a, g))
    return weight, weight.new_empty(weight.shape)


def _run_bias_grads(g: Tensor, backend: Backend | None) -> Tensor:
    chosen = choose(backend, g, native=NATIVE_DTYPES, triton=TRITON_DTYPES)
    bias: Tensor = implementation(__name__, chosen).bias_grads(g)
    return bias


def _fake_bias_grads(g: Tensor, _: Backend | None) -> Tensor:
    return g.new_empty((g.shape[0], g.shape[2]), dtype=accumulation_dtype(g))


_affine_grads = register(
    "affine_grads(Tensor a, Tensor g, str? backend) -> (Tensor, Tensor)", _run_affine_grads, _fake_affine_grads
)
_bias_grads = register("bias_grads(Tensor g, str? backend) -> Tensor", _run_bias_grads, _fake_bias_grads)
