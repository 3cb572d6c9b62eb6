"""``conv`` on the CPU, from float32 or bfloat16: ``csrc/cpu/conv.cpp``, one pass for gradients and norms.

Sums are in float32. Where the processor multiplies bfloat16 (AVX512-BF16), it does; results below 1e-38 are then 0.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.chunks import in_chunks
from dpfast.kernels.conv.problem import Problem, of_convolution, three
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.dispatch import NATIVE_DTYPES, native_module
from dpfast.kernels.precision import full_precision, gram, gram_error, vanished


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``G [B, numbers]`` in the order of ``spec``, and ``|G_i|^2 [B]`` of the numbers stored."""
    return Gradients(of_convolution(a, g, spec, examples)).per_example_grads()


def sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``|G_i|^2 [B]``, float64; no ``G_i`` is stored."""
    return Gradients(of_convolution(a, g, spec, examples)).sq_norms()


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [numbers]`` of the very ``G_i`` that the others measure; ``w_i = 0`` contributes exactly 0."""
    return Gradients(of_convolution(a, g, spec, len(w))).clipped_sum(w)


def scratch_bytes(a: Tensor, g: Tensor, spec: ConvSpec, examples: int, *, weighted: bool) -> int:
    """Of the numbers that a call sums in. weighted: of ``clipped_sum``."""
    return Gradients(of_convolution(a, g, spec, examples)).scratch_bytes(weighted=weighted)


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
        three(x.shape[2:], 1),
        three(y.shape[2:], 1),
        three(spec.kernel, 1),
        three(spec.dilation, 1),
        three([before for before, _ in spec.padding], 0),
    ]
    grams = [_pixel_gram(t, examples, rows) for t in (x, y)]
    sq = x.new_empty(examples, dtype=torch.float64)
    magnitude = torch.empty_like(sq)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in grams)  # what is read through a pointer
    pointers = [t.data_ptr() for t in (*grams, sq, magnitude)]
    native_module().conv_gram(examples, rows, geometry, *pointers, torch.get_num_threads())
    _, lines, width = three(y.shape[2:], 1)
    error = gram_error(x.shape[1], y.shape[1], torch.float32, steps=lines * (width // 8 + 1))  # dots() in csrc
    of_x, of_y = (t.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for t in grams)
    lost = math.prod(spec.kernel) * vanished(x.shape[1], y.shape[1], of_x, of_y, torch.float32)
    return sq, error * magnitude + lost


def _pixel_gram(t: Tensor, examples: int, rows: int) -> Tensor:
    """``[N, C, *space]`` to ``[B, rows * pixels, rows * pixels]``."""
    channels_first = t.float().reshape(examples, rows, t.shape[1], math.prod(t.shape[2:])).transpose(1, 2).flatten(2)
    return gram(channels_first.mT)


class Gradients:
    """The weight gradients that a problem asks for."""

    def __init__(self, problem: Problem) -> None:
        self.x, self.y = problem.x, problem.y
        self.examples, self.numbers, self.empty = problem.sizes[0], problem.numbers, problem.empty
        dtype = NATIVE_DTYPES[self.x.dtype]
        patches = problem.by_channel and math.prod(problem.geometry[2]) > 1
        self.native = _native(problem.sizes, problem.geometry, problem.x_stride, problem.y_stride, dtype, patches)

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
        [*(three(numbers, 1) for numbers in most), three(padding, 0)],
        (*x_stride[:2], *three(x_stride[2:], 0)),
        (*y_stride[:2], *three(y_stride[2:], 0)),
        dtype,
        patches,
    )
