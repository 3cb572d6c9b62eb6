"""Random numbers that belong to an example, not to its place in a batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter and a key
to four 32-bit words without any state. Here the counter is (block, example id, step, augmentation) and the key
comes from the seed and the name of the stream, so dropping an example leaves the others' numbers alone, and
retrying a microbatch in halves repeats them. These numbers augment images and draw timesteps; noise that
protects privacy and Poisson sampling never come from here.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dpfast.errors import ConfigError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words (broadcast together); four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, by 16-bit halves: int64 would overflow on the whole."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


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
        words = self._words(math.prod(shape), stream)
        return ((words >> 8) * 2.0**-24).float().view(self.rows, *shape)

    def normal(self, *shape: int, stream: str) -> Tensor:
        """float32 ``[N, *shape]``, standard normal (Box-Muller in float64; at most 6.7 in magnitude)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        pairs = self._words(2 * half, stream).view(self.rows, half, 2).double()
        radius = (-2.0 * ((pairs[..., 0] + 1) * 2.0**-32).log()).sqrt()
        angle = pairs[..., 1] * (2 * math.pi * 2.0**-32)
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return values.flatten(1)[:, :count].float().view(self.rows, *shape)

    def _words(self, count: int, stream: str) -> Tensor:
        """``count`` 32-bit words per row, int64 ``[N, count]``."""
        digest = hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        blocks = torch.arange((count + 3) // 4, device=self.ids.device)
        example = (self.ids & _WORD).repeat_interleave(self.augmult)[:, None]
        view = self.views[:, None]
        step = torch.full_like(view, self.step)
        words = philox4x32((blocks.expand(self.rows, -1), example, step, view), key)
        return torch.stack([word.expand(self.rows, len(blocks)) for word in words], dim=-1).flatten(1)[:, :count]
