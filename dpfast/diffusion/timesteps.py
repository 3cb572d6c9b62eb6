"""Distributions of the diffusion timestep, as values.

A distribution maps a uniform number to a timestep by its inverse distribution function, so that the K rows of an
example can share the interval [0, 1) evenly (stratified sampling).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError


class TimestepDistribution(Protocol):
    """A distribution over the timesteps 0 .. num_train_timesteps - 1."""

    def icdf(self, u: Tensor, num_train_timesteps: int) -> Tensor:
        """int64 timesteps for ``u`` in [0, 1), of the same shape; non-decreasing in ``u``."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every timestep alike."""

    def icdf(self, u: Tensor, num_train_timesteps: int) -> Tensor:
        """``floor(u * num_train_timesteps)``."""
        return (u.double() * num_train_timesteps).long()


@dataclass(frozen=True, init=False)
class MixtureOfUniforms:
    """``sum_i weight_i * Uniform{low_i, ..., high_i - 1}``, given as ``[(weight, low, high), ...]``.

    Weights sum to 1, intervals are half-open and may not overlap. Biased timesteps in fine-tuning are one of the
    tricks of Ghalebikesabi et al. (arXiv 2302.13861). Raises ConfigError otherwise.
    """

    components: tuple[tuple[float, int, int], ...]

    def __init__(self, components: Sequence[tuple[float, int, int]]) -> None:
        ordered = sorted((float(w), int(low), int(high)) for w, low, high in components)
        ordered.sort(key=lambda component: component[1])
        object.__setattr__(self, "components", tuple(ordered))
        problem = self._problem()
        if problem:
            raise ConfigError(f"timestep mixture {list(components)}: {problem}")

    def _problem(self) -> str:
        weights = [weight for weight, _, _ in self.components]
        if not weights or min(weights) < 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            return f"weights must be non-negative and sum to 1, got a sum of {sum(weights)}"
        for _, low, high in self.components:
            if not 0 <= low < high:
                return f"expected 0 <= low < high, got [{low}, {high})"
        for (_, _, end), (_, start, _) in zip(self.components, self.components[1:], strict=False):
            if start < end:
                return f"intervals overlap at {start}; split them so that each timestep lies in one"
        return ""

    def icdf(self, u: Tensor, num_train_timesteps: int) -> Tensor:
        """Intervals in ascending order; raises ConfigError if one ends beyond ``num_train_timesteps``."""
        if self.components[-1][2] > num_train_timesteps:
            raise ConfigError(
                f"timestep mixture ends at {self.components[-1][2]}, but the scheduler has {num_train_timesteps} steps"
            )
        weight, low, high = (
            torch.tensor(column, dtype=torch.float64, device=u.device)
            for column in zip(*[c for c in self.components if c[0] > 0], strict=True)
        )
        ends = weight.cumsum(0)
        u = u.double()
        which = torch.searchsorted(ends, u, right=True).clamp_max(len(weight) - 1)
        local = (u - (ends - weight)[which]) / weight[which]
        step = low[which] + (local.clamp(0, 1) * (high - low)[which]).floor()
        return torch.minimum(step, high[which] - 1).long()


def draw_timesteps(
    distribution: TimestepDistribution, keys: RowKeys, num_train_timesteps: int, *, stratified: bool = True
) -> Tensor:
    """int64 ``[N]``, by ``draw_levels``."""
    return distribution.icdf(draw_levels(keys, stratified=stratified), num_train_timesteps)


def draw_levels(keys: RowKeys, *, stratified: bool) -> Tensor:
    """float64 ``[N]`` in [0, 1), which an inverse distribution function turns into how noisy each row is.

    Stratified, row k of an example takes ``(k + u_k) / K``: its K rows cover [0, 1) evenly.
    """
    u = keys.uniform(stream="timestep").double()
    return (keys.views + u) / keys.views_of_example if stratified else u
