"""The library's own weight gradient (oneDNN, cuDNN): of one example at a time, and of a weighted batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.precision import accumulation_dtype, full_precision


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


def each_grad(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Iterator[Tensor]:
    """``G_i`` of one example after the other."""
    if examples:
        for a_i, g_i in zip(a.tensor_split(examples), g.tensor_split(examples), strict=True):
            yield weight_grad(a_i, g_i, spec)


@full_precision()
def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i`` from one weight gradient; an example with ``w_i = 0`` contributes exactly 0."""
    dtype = accumulation_dtype(a, g)
    weight = w.to(dtype).repeat_interleave(a.shape[0] // max(len(w), 1)).view(-1, *[1] * (a.ndim - 1))
    kept = weight > 0
    return weight_grad(torch.where(kept, a, 0), torch.where(kept, weight * g.to(dtype), 0), spec)
