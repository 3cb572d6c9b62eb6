"""Random numbers that belong to an example, not to its place in a batch.

They come from a counter (example id, step, augmentation) and a key made of the seed and the name of the stream
(``dpfast.kernels.keyed``), so dropping an example leaves the others' numbers alone, and retrying a microbatch in halves
repeats them. These numbers augment images and draw timesteps; noise that protects privacy and Poisson sampling never
come from here.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dpfast.errors import ConfigError
from dpfast.kernels import keyed

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class RowKeys:
    """Names the ``N = B * augmult`` rows of a batch: row ``i * augmult + k`` is augmentation k of ``ids[i]``.

    seed: of the run; ids: int64 ``[B]``, each example's number in its data set, below 2**32; step: of training.
    first, of: where only some of an example's augmentations are in the batch, the number of the first (k counts from
    there), and how many an example has in all (``augmult`` by default).
    """

    seed: int
    ids: Tensor
    step: int
    augmult: int = 1
    first: int = 0
    of: int | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.ndim != 1:
            raise ConfigError(f"ids must be int64 [B], got {self.ids.dtype} {tuple(self.ids.shape)}")
        if self.augmult < 1 or not 0 <= self.step <= _WORD:
            raise ConfigError(f"expected augmult >= 1 and 0 <= step < 2**32, got {self.augmult} and {self.step}")

    @property
    def views(self) -> Tensor:
        """int64 ``[N]``: which of its example's augmentations each row is."""
        return torch.arange(self.first, self.first + self.augmult, device=self.ids.device).repeat(self.ids.shape[0])

    @property
    def views_of_example(self) -> int:
        """How many augmentations an example has in the step."""
        return self.augmult if self.of is None else self.of

    def part(self, first: int, count: int) -> Self:
        """The same rows, less all but at most ``count`` of each example's from number ``first`` on."""
        count = min(count, self.augmult - first)
        return replace(self, augmult=count, first=self.first + first, of=self.views_of_example)

    @property
    def rows(self) -> int:
        """N = B * augmult."""
        return self.ids.shape[0] * self.augmult

    def uniform(self, *shape: int, stream: str) -> Tensor:
        """float32 ``[N, *shape]``, uniform on multiples of 2**-24 in [0, 1); the same for the same stream name."""
        return self._drawn(keyed.uniform, shape, stream)

    def normal(self, *shape: int, stream: str) -> Tensor:
        """float32 ``[N, *shape]``, standard normal (Box-Muller in float64; at most 6.7 in magnitude)."""
        return self._drawn(keyed.normal, shape, stream)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...], stream: str) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        of = {"step": self.step, "count": math.prod(shape), "first": self.first}
        return draw(self.ids, self.augmult, key, **of).view(self.rows, *shape)
