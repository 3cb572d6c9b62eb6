"""Image augmentation with a draw of its own for each of an example's K rows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Augment:
    """flip: mirror left and right with probability 1/2; shift: crop after padding by this many pixels.

    fill: value of the padding, None repeats the border. Digits must not be flipped: a mirrored 2 is no digit.
    """

    flip: bool = False
    shift: int = 0
    fill: float | None = None

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError(f"Augment(shift={self.shift}): expected a number of pixels, 0 or more")

    def __call__(self, images: Tensor, keys: RowKeys) -> Tensor:
        """Images float ``[B, C, H, W]`` -> ``[N, C, H, W]``, row ``i * K + k`` from ``images[i]``."""
        rows = images.repeat_interleave(keys.augmult, dim=0)
        if self.shift and len(rows):
            rows = self._shifted(rows, keys)
        if self.flip:
            mirrored = keys.uniform(stream="flip") < 0.5
            rows = torch.where(mirrored[:, None, None, None], rows.flip(3), rows)
        return rows

    def _shifted(self, rows: Tensor, keys: RowKeys) -> Tensor:
        height, width = rows.shape[2:]
        pad = [self.shift] * 4
        padded = F.pad(rows, pad, mode="replicate") if self.fill is None else F.pad(rows, pad, value=self.fill)
        offsets = (keys.uniform(2, stream="shift") * (2 * self.shift + 1)).long()
        return self._cut(self._cut(padded, 2, height, offsets[:, 0]), 3, width, offsets[:, 1])

    def _cut(self, rows: Tensor, dim: int, size: int, offsets: Tensor) -> Tensor:
        """``size`` lines of each row from its own offset on. By ``where``, not by index: a private step has nothing to
        show of what is not looked up.
        """
        cut = rows.narrow(dim, 0, size)
        for offset in range(1, 2 * self.shift + 1):
            cut = torch.where((offsets == offset)[:, None, None, None], rows.narrow(dim, offset, size), cut)
        return cut
