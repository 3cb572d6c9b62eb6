"""By how much an example's gradient is scaled: the two ways to clip."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from dpfast.errors import ConfigError
from dpfast.kernels.clip import clip_factors

Clipping = Literal["flat", "automatic"]
LEAST = 1e-8  # stability of automatic clipping


@dataclass(frozen=True)
class ClipRule:
    """``w_i = min(1, C / |G_i|)`` (flat), or with a stability gamma ``w_i = C / (|G_i| + gamma)`` (automatic: Bu et
    al., arXiv 2206.07136).

    Guarantee: ``w_i |G_i| <= C``, and ``w_i = 0`` where the norm is not finite. So the sensitivity of the sum is C for
    either rule. What float32 squares cannot hold is not measured, 1e-19 for each number of a gradient at most: with a
    gamma of ``LEAST`` or more that weighs less than 1e-6 C in a gradient of ten billion numbers.
    """

    max_grad_norm: float
    stability: float | None = None

    @classmethod
    def of(cls, max_grad_norm: float, clipping: Clipping, stability: float) -> Self:
        """From what a user gives; raises ``ConfigError`` for values out of range."""
        if not 0 < max_grad_norm < float("inf"):
            raise ConfigError(f"max_grad_norm={max_grad_norm!r}: expected a positive, finite number")
        if clipping not in get_args(Clipping):
            raise ConfigError(f"clipping={clipping!r}: expected one of {', '.join(get_args(Clipping))}")
        if clipping == "flat":
            return cls(float(max_grad_norm))
        if not LEAST <= stability < float("inf"):
            raise ConfigError(f"stability={stability!r}: expected a finite number from {LEAST:g} on (usually 0.01)")
        if max_grad_norm / stability > torch.finfo(torch.float32).max:  # sums are weighted in float32
            raise ConfigError(
                f"stability={stability!r} is too small for max_grad_norm={max_grad_norm!r}: expected a quotient, the"
                " largest factor, that float32 can hold"
            )
        return cls(float(max_grad_norm), float(stability))

    def __str__(self) -> str:
        return "flat" if self.stability is None else f"automatic, stability {self.stability!r}"

    def factors(self, sq: Tensor) -> Tensor:
        """``w [B]`` of squared norms ``[B]``."""
        return clip_factors(sq, self.max_grad_norm, stability=self.stability)
