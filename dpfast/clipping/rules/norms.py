"""Rules for normalisation layers, and refusals of what keeps statistics of activations.

The gradient of an affine needs the normalised input, recomputed from the input.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dpfast.clipping.problems import Problem
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import IsTracked, Rule, Terms, Use, present
from dpfast.clipping.terms import Stored
from dpfast.kernels.affine import affine_grads
from dpfast.kernels.norm import backward_is_a_kernel, group_norm_backward, group_norm_grads
from dpfast.kernels.precision import accumulation_dtype


def group_norm(
    is_tracked: IsTracked,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Use | None:
    return _group_norm(is_tracked, input, weight, bias, num_groups, eps)


def instance_norm(
    is_tracked: IsTracked,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | Problem | None:
    if not use_input_stats:
        return None
    if running_mean is not None:
        return Problem(
            (),
            "instance_norm in training mode keeps statistics of private activations",
            "use track_running_stats=False, or keep the layer in eval mode (layer.eval())",
        )
    return _group_norm(is_tracked, input, weight, bias, input.shape[1], eps)


def _group_norm(
    is_tracked: IsTracked, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Use | None:
    """Rows first, channels second: affine parameters of shape ``[C]``."""
    if is_tracked(input) or input.ndim < 2:
        return None

    def of_affine(scale: Tensor, shift: Tensor) -> Terms:
        return present(is_tracked, [(weight, lambda: Stored(scale)), (bias, lambda: Stored(shift))])

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        return of_affine(*group_norm_grads(saved[0], g, groups, eps, rows.examples))

    def backward(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> tuple[Tensor, Terms]:
        of_input, *affine = group_norm_backward(saved[0], g, weight, groups, eps, rows.examples)
        return of_input, of_affine(*affine)

    at_once = input.requires_grad and backward_is_a_kernel(input, weight)
    return Use((input,), terms, (0,), backward if at_once else None)


def _channel_norm(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Use | None:
    """Rows first, channels second: affine parameters of shape ``[C]``."""
    if is_tracked(input):
        return None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        dtype = accumulation_dtype(g)
        x = saved[0].to(dtype)
        a = rows.split(normalise(x)).flatten(3) if x.ndim > 2 else rows.split(normalise(x)).unsqueeze(3)
        g = rows.split(g.to(dtype))
        scale, shift = affine_grads(a, g.flatten(3) if g.ndim > 3 else g.unsqueeze(3))
        return present(is_tracked, [(weight, lambda: Stored(scale)), (bias, lambda: Stored(shift))])

    return Use((input,), terms, (0,))


def layer_norm(
    is_tracked: IsTracked,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Use | None:
    return _last_dims_norm(
        is_tracked,
        input,
        normalized_shape,
        weight,
        bias,
        lambda x: F.layer_norm(x, normalized_shape, eps=eps),
    )


def rms_norm(
    is_tracked: IsTracked,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Use | None:
    return _last_dims_norm(
        is_tracked, input, normalized_shape, weight, None, lambda x: F.rms_norm(x, normalized_shape, eps=eps)
    )


def _last_dims_norm(
    is_tracked: IsTracked,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Use | None:
    """Affine parameters of the shape of the last dimensions."""
    if is_tracked(input) or input.ndim <= len(shape):
        return None
    features = math.prod(shape)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        def view(x: Tensor) -> Tensor:
            """``[..., N, ..., *shape] -> [B, M, C, 1]``."""
            x = rows.split(x)
            return x.reshape(x.shape[0], -1, features, 1)

        dtype = accumulation_dtype(g)
        scale, shift = affine_grads(view(normalise(saved[0].to(dtype))), view(g.to(dtype)))
        return present(
            is_tracked,
            [
                (weight, lambda: Stored(scale.unflatten(1, tuple(shape)))),
                (bias, lambda: Stored(shift.unflatten(1, tuple(shape)))),
            ],
        )

    return Use((input,), terms, tuple(range(input.ndim - len(shape))))


def batch_norm(
    is_tracked: IsTracked,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | Problem | None:
    if training:
        return Problem(
            (),
            "batch_norm in training mode mixes the rows of different examples",
            "replace BatchNorm by GroupNorm, or keep the layer in eval mode (layer.eval()) with fixed statistics",
        )
    if running_mean is None or running_var is None:
        return None
    shape = (1, -1, *[1] * (input.ndim - 2))
    mean, scale = running_mean.view(shape), (running_var + eps).rsqrt().view(shape)
    return _channel_norm(is_tracked, input, weight, bias, lambda x: (x - mean) * scale)


def _in_order_of_torch(rule: Rule) -> Rule:
    """``torch.batch_norm`` and ``torch.instance_norm`` take the affine before the statistics."""

    def reordered(
        is_tracked: IsTracked,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> Use | Problem | None:
        return rule(is_tracked, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return reordered


torch_batch_norm, torch_instance_norm = _in_order_of_torch(batch_norm), _in_order_of_torch(instance_norm)


def fake_quant(is_tracked: IsTracked, input: Tensor, observer_on: Tensor, *_: Any, **__: Any) -> Problem | None:
    if not observer_on.any():
        return None
    return Problem((), "it observes the range of private activations", "switch the observers off (disable_observer)")
