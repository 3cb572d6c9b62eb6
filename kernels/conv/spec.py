"""The geometry of a convolution."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEW_CHANNELS = 8  # one vector of AVX2: with fewer, vectors over channels would be mostly empty


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
    ) -> "ConvSpec":
        """From the arguments of ``torch.nn.functional.conv*``; ``padding`` may be ``"same"`` or ``"valid"``."""
        return _spec(
            weight.shape, _plain(stride), _plain(padding), _plain(dilation), groups, transposed, _plain(output_padding)
        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Once: every step looks things up by it."""
        return hash((self.weight_shape, self.stride, self.padding, self.dilation, self.groups, self.transposed))

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        """As an op takes them: padding as before, after, before, ..."""
        padding = [p for pair in self.padding for p in pair]
        return (
            self.weight_shape,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.transposed,
            self.output_padding,
        )

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "ConvSpec":
        """From ``arguments``, which may have come as lists."""
        return _from_arguments(*(tuple(value) if isinstance(value, list) else value for value in arguments))

    @property
    def numbers(self) -> int:
        """In the weight."""
        return math.prod(self.weight_shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def by_channel(self) -> bool:
        """How stored gradients are ordered: by output channel, channel and tap, as weights are, where there are few
        channels; else by tap, output channel and channel, so that channels lie next to each other.
        """
        return math.prod(self.kernel) == 1 or self.weight_shape[1] < FEW_CHANNELS

    def flat(self, grads: Tensor) -> Tensor:
        """``[B, *weight_shape]`` to ``[B, numbers]`` in the order of stored gradients."""
        if self.by_channel:
            return grads.flatten(1)
        return grads.permute(0, *range(3, grads.ndim), 1, 2).flatten(1)

    def weights(self, flat: Tensor) -> Tensor:
        """``[B, numbers]`` in that order to ``[B, *weight_shape]``, a view."""
        if self.by_channel:
            return flat.unflatten(1, self.weight_shape)
        dims = len(self.kernel)
        taps_first = flat.unflatten(1, (*self.kernel, *self.weight_shape[:2]))
        return taps_first.permute(0, 1 + dims, 2 + dims, *range(1, 1 + dims))

    def weight(self, flat: Tensor) -> Tensor:
        """One of them: ``[numbers]`` to ``weight_shape``."""
        return self.weights(flat.unsqueeze(0)).squeeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """Zero-pad the spatial dimensions of ``x [N, C, *space]``."""
        flat = [p for pair in reversed(self.padding) for p in pair]
        return torch.nn.functional.pad(x, flat) if any(flat) else x


@functools.lru_cache(maxsize=4096)
def _spec(
    shape: torch.Size,
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: int | tuple[int, ...],
) -> ConvSpec:
    kernel = shape[2:]
    dims = len(kernel)
    dilations = _per_dim(dilation, dims)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _per_dim(0 if isinstance(padding, str) else padding, dims))
    return ConvSpec(
        weight_shape=tuple(shape),
        stride=_per_dim(stride, dims),
        padding=pads,
        dilation=dilations,
        groups=groups,
        transposed=transposed,
        output_padding=_per_dim(output_padding, dims),
    )


@functools.lru_cache(maxsize=4096)
def _from_arguments(
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
) -> ConvSpec:
    return ConvSpec(
        weight_shape=weight_shape,
        stride=stride,
        padding=tuple(zip(padding[::2], padding[1::2], strict=True)),
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=output_padding,
    )


def _plain(value: Any) -> Any:
    """What can be a key."""
    return value if isinstance(value, int | str) else tuple(value)


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
