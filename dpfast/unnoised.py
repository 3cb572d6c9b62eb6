"""What ``unsafe_debug`` shows of a private step, and the mark of what a ledger holds of it."""

from collections.abc import Iterable

import torch
from torch import Tensor

UNSAFE_DEBUG = "UNSAFE DEBUG"
MARK = f"{UNSAFE_DEBUG}: un-noised values are shown"


class Unnoised:
    """Losses, norms and clip factors of the examples that a step has drawn: private values, no noise on any of them."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._factors: list[Tensor] = []

    def add(self, losses: Iterable[Tensor], norms: Tensor, factors: Tensor, mask: Tensor) -> None:
        """Of a physical batch: losses ``[m*k]`` of each pass; norms, factors and mask ``[m]``, False for padding."""
        self._losses += [part.reshape(len(mask), -1)[mask].flatten() for part in losses]
        self._norms.append(norms[mask])
        self._factors.append(factors[mask])

    def message(self) -> str:
        """One line. Clipped are examples of a factor below 1."""
        examples = sum(map(len, self._norms))
        said = f"{UNSAFE_DEBUG}: {examples} example{'' if examples == 1 else 's'}"
        if not examples:
            return said
        losses, norms, factors = (torch.cat(parts).double() for parts in (self._losses, self._norms, self._factors))
        clipped = (factors < 1).double().mean()
        return (
            f"{said}, mean loss {losses.mean():.3g}, median norm {norms.median():.3g}, largest {norms.max():.3g},"
            f" {clipped:.0%} clipped"
        )
