"""``conv`` on the CPU, from float32 or bfloat16: ``csrc/cpu/conv.cpp``, one pass for gradients and norms.

Sums are in float32. Where the processor multiplies bfloat16 (AVX512-BF16), it does; results below 1e-38 are then 0.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.chunks import in_chunks
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.dispatch import NATIVE_DTYPES, native_module
from dpfast.kernels.precision import full_precision, gram, gram_error, vanished


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``G [B, numbers]`` in the order of ``spec``, and ``|G_i|^2 [B]`` of the numbers stored."""
    return of_convolution(a, g, spec, examples).per_example_grads()


def sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``|G_i|^2 [B]``, float64; no ``G_i`` is stored."""
    return of_convolution(a, g, spec, examples).sq_norms()


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [numbers]`` of the very ``G_i`` that the others measure; ``w_i = 0`` contributes exactly 0."""
    return of_convolution(a, g, spec, len(w)).clipped_sum(w)


def takes_gram(spec: ConvSpec) -> bool:
    """Whether ``gram_sq_norms`` knows this geometry."""
    return spec.groups == 1 and all(stride == 1 for stride in spec.stride)


def gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Grams of pixels, looked at through each tap's shift, and the bound on its rounding error."""
    rows = a.shape[0] // max(1, examples)

    def some(of: slice) -> tuple[Tensor, Tensor]:
        own = slice(of.start * rows, of.stop * rows)
        return _gram_sq_norms(a[own], g[own], spec, of.stop - of.start)

    return in_chunks(gram_bytes(a, g, rows), examples, some)


def gram_bytes(a: Tensor, g: Tensor, rows: int) -> int:
    """Of one example's two Grams, and what they are made from where that is not there as it lies."""
    copies = (a.dtype != torch.float32) + (rows > 1)
    numbers = sum(rows**2 * math.prod(t.shape[2:]) ** 2 + copies * rows * t[:1].numel() for t in (a, g))
    return 4 * numbers


@full_precision()
def _gram_sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    x, y = (g, a) if spec.transposed else (a, g)
    rows = x.shape[0] // max(1, examples)
    geometry = [
        _three(x.shape[2:], 1),
        _three(y.shape[2:], 1),
        _three(spec.kernel, 1),
        _three(spec.dilation, 1),
        _three([before for before, _ in spec.padding], 0),
    ]
    grams = [_pixel_gram(t, examples, rows) for t in (x, y)]
    sq = x.new_empty(examples, dtype=torch.float64)
    magnitude = torch.empty_like(sq)
    pointers = [t.data_ptr() for t in (*grams, sq, magnitude)]
    native_module().conv_gram(examples, rows, geometry, *pointers, torch.get_num_threads())
    _, lines, width = _three(y.shape[2:], 1)
    error = gram_error(x.shape[1], y.shape[1], torch.float32, steps=lines * (width // 8 + 1))  # dots() in csrc
    of_x, of_y = (t.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for t in grams)
    lost = math.prod(spec.kernel) * vanished(x.shape[1], y.shape[1], of_x, of_y, torch.float32)
    return sq, error * magnitude + lost


def _pixel_gram(t: Tensor, examples: int, rows: int) -> Tensor:
    """``[N, C, *space]`` to ``[B, rows * pixels, rows * pixels]``."""
    channels_first = t.float().reshape(examples, rows, t.shape[1], math.prod(t.shape[2:])).transpose(1, 2).flatten(2)
    return gram(channels_first.mT)


class Problem:
    """What ``csrc`` is asked for: x, whose patches are taken, y, whose positions are summed over, and the geometry.

    sizes: examples, rows of an example, groups, channels of x and of y in a group. geometry: input, output, kernel,
    stride, dilation and padding of up to three dimensions. Strides: rows, channels, those dimensions. patches: see
    ``csrc/dpfast.h``.
    """

    def __init__(
        self,
        x: tuple[Tensor, tuple[int, ...]],
        y: tuple[Tensor, tuple[int, ...]],
        sizes: tuple[int, int, int, int, int],
        geometry: tuple[tuple[int, ...], ...],
        *,
        patches: bool = False,
    ) -> None:
        (self.x, x_stride), (self.y, y_stride) = x, y
        self.examples = sizes[0]
        self.native = _native(sizes, geometry, x_stride, y_stride, NATIVE_DTYPES[self.x.dtype], patches)
        _, _, groups, c, p = sizes
        self.numbers = c * groups * p * math.prod(geometry[2])
        self.empty = 0 in (*sizes, *geometry[0], *geometry[1])

    def per_example_grads(self) -> tuple[Tensor, Tensor]:
        """``[B, numbers]`` in the order of ``csrc``, and their squared norms ``[B]``."""
        out = self.x.new_empty((self.examples, self.numbers), dtype=torch.float32)
        sq = self.x.new_empty(self.examples, dtype=torch.float64)
        self._run(out=out, sq=sq)
        return out, sq

    def sq_norms(self) -> Tensor:
        """``[B]``."""
        sq = self.x.new_empty(self.examples, dtype=torch.float64)
        self._run(sq=sq)
        return sq

    def clipped_sum(self, w: Tensor) -> Tensor:
        """``[numbers]``."""
        out = self.x.new_empty(self.numbers, dtype=torch.float32)
        self._run(weights=w.to(torch.float32).contiguous(), out=out)
        return out

    def scratch_bytes(self, *, weighted: bool) -> int:
        """Of the numbers that a run sums in. weighted: for ``clipped_sum``."""
        return 0 if self.empty else 8 * int(self.native.scratch(weighted, torch.get_num_threads()))

    def _run(self, *, weights: Tensor | None = None, out: Tensor | None = None, sq: Tensor | None = None) -> None:
        if self.empty:  # sums of nothing
            for result in (out, sq):
                if result is not None:
                    result.zero_()
            return
        threads = torch.get_num_threads()
        scratch = self.x.new_empty(self.native.scratch(weights is not None, threads), dtype=torch.float64)
        pointers = [0 if t is None else t.data_ptr() for t in (self.x, self.y, weights, out, sq, scratch)]
        native_module().conv_grads(self.native, *pointers, threads)


@functools.lru_cache(maxsize=4096)
def _native(
    sizes: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    x_stride: tuple[int, ...],
    y_stride: tuple[int, ...],
    dtype: int,
    patches: bool,
) -> Any:
    *most, padding = geometry
    return native_module().Conv(
        sizes,
        [*(_three(numbers, 1) for numbers in most), _three(padding, 0)],
        (*x_stride[:2], *_three(x_stride[2:], 0)),
        (*y_stride[:2], *_three(y_stride[2:], 0)),
        dtype,
        patches,
    )


def of_convolution(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Problem:
    """A transposed convolution is one with input and output gradient exchanged."""
    x, y = (g, a) if spec.transposed else (a, g)
    rows = x.shape[0] // max(1, examples)
    sizes = (examples, rows, spec.groups, x.shape[1] // spec.groups, y.shape[1] // spec.groups)
    padding = tuple(before for before, _ in spec.padding)
    geometry = (x.shape[2:], y.shape[2:], spec.kernel, spec.stride, spec.dilation, padding)
    patches = spec.by_channel and math.prod(spec.kernel) > 1
    return Problem((x, x.stride()), (y, y.stride()), sizes, geometry, patches=patches)


def of_linear(a: Tensor, g: Tensor) -> Problem:
    """``a [B, M, D]`` and ``g [B, M, P]``: one tap, M positions along a line, features as channels."""
    sizes = (a.shape[0], 1, 1, a.shape[2], g.shape[2])
    strides = [(t.stride(0), t.stride(2), t.stride(1)) for t in (a, g)]
    return Problem((a, strides[0]), (g, strides[1]), sizes, (a.shape[1:2], a.shape[1:2], (1,), (1,), (1,), (0,)))


def _three(numbers: Sequence[int], missing: int) -> tuple[int, ...]:
    return (*[missing] * (3 - len(numbers)), *numbers)
