"""The geometry of a convolution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvSpec:
    """Weight shape, and stride, padding (before, after), dilation per spatial dimension, and groups.

    ``weight_shape`` is torch's: ``[Cout, Cin/groups, *kernel]``, transposed ``[Cin, Cout/groups, *kernel]``.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        weight: Tensor,
        *,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> Self:
        """From the arguments of ``torch.nn.functional.conv*``; ``padding`` may be ``"same"`` or ``"valid"``."""
        kernel = weight.shape[2:]
        dims = len(kernel)
        dilations = _per_dim(dilation, dims)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        else:
            pads = tuple((p, p) for p in _per_dim(0 if isinstance(padding, str) else padding, dims))
        return cls(
            weight_shape=tuple(weight.shape),
            stride=_per_dim(stride, dims),
            padding=pads,
            dilation=dilations,
            groups=groups,
            transposed=transposed,
            output_padding=_per_dim(output_padding, dims),
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def pad(self, x: Tensor) -> Tensor:
        """Zero-pad the spatial dimensions of ``x [N, C, *space]``."""
        flat = [p for pair in reversed(self.padding) for p in pair]
        return torch.nn.functional.pad(x, flat) if any(flat) else x


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
