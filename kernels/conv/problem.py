"""What a kernel is asked for: the weight gradients of a convolution, plain or transposed, or of a linear map."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dpfast.kernels.conv.spec import ConvSpec


class Problem(NamedTuple):
    """x, whose patches are taken, y, whose positions are summed over, and the geometry.

    Strides: rows, channels, then one to three dimensions of space. sizes: examples, rows of an example, groups,
    channels of x and of y in a group. geometry: input, output, kernel, stride, dilation and padding (before) of those
    dimensions. by_channel: as in ``ConvSpec``.
    """

    x: Tensor
    y: Tensor
    x_stride: tuple[int, ...]
    y_stride: tuple[int, ...]
    sizes: tuple[int, int, int, int, int]
    geometry: tuple[tuple[int, ...], ...]
    by_channel: bool = True

    @property
    def numbers(self) -> int:
        """Of the weight."""
        _, _, groups, c, p = self.sizes
        return groups * c * p * math.prod(self.geometry[2])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to add up."""
        return 0 in (*self.sizes, *self.geometry[0], *self.geometry[1])


def of_convolution(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Problem:
    """A transposed convolution is one with input and output gradient exchanged."""
    x, y = (g, a) if spec.transposed else (a, g)
    rows = x.shape[0] // max(1, examples)
    sizes = (examples, rows, spec.groups, x.shape[1] // spec.groups, y.shape[1] // spec.groups)
    padding = tuple(before for before, _ in spec.padding)
    geometry = (x.shape[2:], y.shape[2:], spec.kernel, spec.stride, spec.dilation, padding)
    return Problem(x, y, x.stride(), y.stride(), sizes, geometry, spec.by_channel)


def of_linear(a: Tensor, g: Tensor) -> Problem:
    """``a [B, M, D]`` and ``g [B, M, P]``: one tap, M positions along a line, features as channels."""
    sizes = (a.shape[0], 1, 1, a.shape[2], g.shape[2])
    x_stride, y_stride = [(t.stride(0), t.stride(2), t.stride(1)) for t in (a, g)]
    return Problem(a, g, x_stride, y_stride, sizes, (a.shape[1:2], a.shape[1:2], (1,), (1,), (1,), (0,)))


def takes_gram(spec: ConvSpec) -> bool:
    """Whether a GPU looks at one Gram of pixels through shifts."""
    return spec.groups == 1 and all(stride == 1 for stride in spec.stride) and len(spec.kernel) < 3


def gram_bytes(a: Tensor, g: Tensor, rows: int) -> int:
    """Of one example's Gram of pixels there."""
    return 4 * (rows * max(math.prod(t.shape[2:]) for t in (a, g))) ** 2


def three(numbers: Sequence[int], missing: int) -> tuple[int, ...]:
    """Of three dimensions."""
    return (*[missing] * (3 - len(numbers)), *numbers)
