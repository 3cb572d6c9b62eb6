"""Rules for convolutions, plain and transposed."""

from collections.abc import Sequence

from torch import Tensor

from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import IsTracked, Terms, Use, present
from dpfast.clipping.terms import ConvTerm, Stored
from dpfast.kernels.affine import bias_grads
from dpfast.kernels.conv import ConvSpec


def conv(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use | None:
    spec = ConvSpec.of(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return _conv(is_tracked, input, weight, bias, spec)


def conv_transpose(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Use | None:
    spec = ConvSpec.of(
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=True,
        output_padding=output_padding,
    )
    return _conv(is_tracked, input, weight, bias, spec)


def _conv(is_tracked: IsTracked, input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Use | None:
    if is_tracked(input) or input.ndim != weight.ndim:  # an input without a row dimension
        return None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        return present(
            is_tracked,
            [
                # In the dtype of g: autocast has cast the input for the call, and this is the input that was used.
                (weight, lambda: ConvTerm(saved[0].to(g.dtype), g, spec, rows.examples)),
                (bias, lambda: Stored(bias_grads(rows.split(g).flatten(3)))),
            ],
        )

    return Use((input,) if is_tracked(weight) else (), terms, (0,))
