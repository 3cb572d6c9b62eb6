"""Which slice of a tensor belongs to which example."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """B examples along dimension ``dim``, each owning a block of consecutive entries.

    Usually ``dim`` is 0 and a block is the K augmentations of an example; windows, heads or frames folded into the
    rows make it a multiple of K, and sequence-first models have ``dim`` 1.
    """

    examples: int
    dim: int = 0

    def split(self, x: Tensor) -> Tensor:
        """``[..., N, ...] -> [B, N/B, ...]``, the row dimension moved to the front; a view."""
        x = x.movedim(self.dim, 0) if self.dim else x
        return x.view(self.examples, x.shape[0] // self.examples, *x.shape[1:])

    def owner(self, x: Tensor) -> Tensor:
        """The number of the example that owns each row of ``x``, shaped to broadcast against ``x``."""
        numbers = torch.arange(self.examples, device=x.device).repeat_interleave(x.shape[self.dim] // self.examples)
        return numbers.view([-1 if d == self.dim else 1 for d in range(x.ndim)])
