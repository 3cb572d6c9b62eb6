"""The library's own weight gradient (oneDNN, cuDNN), of one example at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.kernels.clip.reference import sq_norms as squares
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.precision import accumulation_dtype


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``G [B, numbers]`` in the order of ``spec``, and ``|G_i|^2 [B]``."""
    out = a.new_empty((examples, spec.numbers), dtype=accumulation_dtype(a, g))
    for weight, grad in zip(spec.weights(out), each_grad(a, g, spec, examples), strict=True):
        weight.copy_(grad)
    return out, squares(out)


def sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``|G_i|^2 [B]`` with one ``G_i`` alive at a time."""
    norms = [squares(grad.reshape(1, -1)) for grad in each_grad(a, g, spec, examples)]
    return torch.cat(norms) if norms else a.new_zeros(0, dtype=torch.float64)


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [numbers]``; an example with ``w_i = 0`` contributes exactly 0.

    ``w_i`` multiplies the very ``G_i`` whose norm was taken: weighting a factor instead rounds every product anew, and
    where positions cancel the rounding of one example can exceed the clip norm a thousandfold.
    """
    total = torch.zeros(spec.weight_shape, dtype=accumulation_dtype(a, g), device=a.device)
    for factor, grad in zip(w.to(total.dtype), each_grad(a, g, spec, len(w)), strict=True):
        total += torch.where(factor > 0, factor * grad, 0)
    return spec.flat(total.unsqueeze(0)).squeeze(0)


def each_grad(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Iterator[Tensor]:
    """``G_i`` of one example after the other."""
    if examples:
        for a_i, g_i in zip(a.tensor_split(examples), g.tensor_split(examples), strict=True):
            yield weight_grad(a_i, g_i, spec)


def weight_grad(a: Tensor, g: Tensor, spec: ConvSpec) -> Tensor:
    """The ordinary weight gradient, summed over all rows of ``a [N, Cin, *space]`` and ``g [N, Cout, *out]``."""
    dtype = accumulation_dtype(a, g)
    padding = [before for before, _ in spec.padding]
    if any(before != after for before, after in spec.padding):
        a, padding = spec.pad(a), [0] * len(padding)
    _, grad, _ = torch.ops.aten.convolution_backward(
        g.to(dtype),
        a.to(dtype),
        a.new_empty(spec.weight_shape, dtype=dtype),
        None,
        spec.stride,
        padding,
        spec.dilation,
        spec.transposed,
        spec.output_padding,
        spec.groups,
        [False, True, False],
    )
    return grad
