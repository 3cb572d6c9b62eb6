"""What ``unsafe_debug`` shows of a private step, and the mark of what a ledger holds of it."""

from collections.abc import Iterable

import torch
from torch import Tensor

UNSAFE_DEBUG = "UNSAFE DEBUG"
MARK = f"{UNSAFE_DEBUG}: un-noised values are shown"


class Unnoised:
    """Losses, norms and clip factors of the examples that a step has drawn: private values, no noise on any of them."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.factors: list[Tensor] = []

    def add(self, losses: Iterable[Tensor], norms: Tensor, factors: Tensor, mask: Tensor) -> None:
        """Of a physical batch: losses ``[m*k]`` of each pass; norms, factors and mask ``[m]``, False for padding."""
        self.losses += [part.reshape(len(mask), -1)[mask].flatten() for part in losses]
        self.norms.append(norms[mask])
        self.factors.append(factors[mask])

    @classmethod
    def of_all(cls, parts: Iterable["Unnoised"]) -> "Unnoised":
        """What several ranks have seen of one step."""
        whole = cls()
        for part in parts:
            whole.losses += part.losses
            whole.norms += part.norms
            whole.factors += part.factors
        return whole

    def message(self) -> str:
        """One line. Clipped are examples of a factor below 1."""
        examples = sum(map(len, self.norms))
        said = f"{UNSAFE_DEBUG}: {examples} example{'' if examples == 1 else 's'}"
        if not examples:
            return said
        losses, norms, factors = (torch.cat(parts).double() for parts in (self.losses, self.norms, self.factors))
        clipped = (factors < 1).double().mean()
        return (
            f"{said}, mean loss {losses.mean():.3g}, median norm {norms.median():.3g}, largest {norms.max():.3g},"
            f" {clipped:.0%} clipped"
        )
