"""What may be told of a private step: numbers that are public, or made of what the step has noised."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.privacy.plan import Plan
from dpfast.ranks import Ranks
from dpfast.ranks.shards import is_shard, local

CURVE = 20  # points at which epsilon is computed: each takes a fifth of a second


@dataclass(frozen=True)
class Diagnostics:
    """Post-processing of a step's noised gradient and of the weights before and after it, which the guarantee covers
    whoever sees them. Of all trained parameters together, as L2 norms.

    noised_gradient_norm: of what the optimizer was given, the sum of clipped gradients with its noise over the expected
        batch size.
    expected_noise_norm: what it would be if all of it were noise: the deviation of the noise times the square root of
        how many numbers there are, over the expected batch size. Known from the plan alone.
    update_norm: by how much the step moved the parameters. parameter_norm: after it. ema_distance: from them to those
        of the averaged model, None without one.
    """

    parameter_norm: float
    update_norm: float
    noised_gradient_norm: float
    expected_noise_norm: float
    ema_distance: float | None = None

    @property
    def noise_share(self) -> float:
        """Of the noised gradient, as a ratio of norms: near 1, below or above by chance, there is little else."""
        return self.expected_noise_norm / self.noised_gradient_norm if self.noised_gradient_norm else math.inf


@dataclass(frozen=True)
class StepReport:
    """What a callback hears of a step.

    step: from 1 to ``steps``; lost_steps: charged so far whose update an interruption has lost. learning_rates: by
    parameter group. expected_batch_size: of the plan. diagnostics: None of a step that another process took and did not
    report, and of training without noise, of which nothing is private.
    """

    step: int
    steps: int
    lost_steps: int
    learning_rates: tuple[float, ...]
    expected_batch_size: float
    diagnostics: Diagnostics | None
    spent: Callable[[int], float] = field(repr=False, compare=False)

    @property
    def epsilon(self) -> float:
        """At most what the steps so far have spent, at the plan's delta: that of the next of a few steps of the plan
        for which it is computed, the first time that somebody asks (some seconds).
        """
        return self.spent(self.step)


class Spent:
    """Epsilon by step, from above."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._curve: list[tuple[int, float]] = []

    def __call__(self, step: int) -> float:
        """After so many steps, or a few more: epsilon never falls."""
        if not self._plan.is_private:
            return math.inf
        if not self._curve:
            self._curve = self._plan.epsilon_curve(CURVE, early=True)
        return self._curve[bisect.bisect_left(self._curve, step, key=lambda point: point[0])][1]


class Watch:
    """Looks at an optimizer's steps: at gradients that are noised already, and at parameters.

    It keeps a copy of the parameters for the length of an update, when a step's activations are gone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: Plan, ranks: Ranks) -> None:
        """After ``DPOptimizer`` was made of it, whose guard then runs before: no sum without noise comes this far."""
        self._optimizer, self._plan, self._ranks = optimizer, plan, ranks
        self._before: list[Tensor] = []
        self._norms = (0.0, 0.0)
        self._hooks = [
            optimizer.register_step_pre_hook(self._begun),
            optimizer.register_step_post_hook(self._done),
        ]

    def close(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()
        self._before = []

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _begun(self, *_: Any) -> None:
        parameters = self._parameters()
        self._norms = (self._norm(p.grad for p in parameters if p.grad is not None), 0.0)
        self._before = [p.detach().clone() for p in parameters]

    def _done(self, *_: Any) -> None:
        moved = self._norm(p.detach() - before for p, before in zip(self._parameters(), self._before, strict=True))
        self._norms, self._before = (self._norms[0], moved), []

    def diagnostics(self, model: nn.Module, averages: Sequence[Tensor] | None) -> Diagnostics:
        """Of the last step. averages: of the model's parameters, in their order."""
        parameters = self._parameters()
        numbers = sum(p.numel() for p in parameters)
        scale, _ = self._plan.noise_on(numbers)
        return Diagnostics(
            parameter_norm=self._norm(p.detach() for p in parameters),
            update_norm=self._norms[1],
            noised_gradient_norm=self._norms[0],
            expected_noise_norm=scale * math.sqrt(numbers) / self._plan.expected_batch_size,
            ema_distance=None if averages is None else self._distance(model, averages),
        )

    def _distance(self, model: nn.Module, averages: Sequence[Tensor]) -> float:
        pairs = zip(model.parameters(), averages, strict=True)
        return self._norm(p.detach() - mean.detach() for p, mean in pairs if p.requires_grad)

    def _norm(self, tensors: Iterable[Tensor]) -> float:
        """L2, of all together, in float64; of shards, those of all ranks."""
        squares = _squares(tensors)
        of_shards = sum(self._ranks.tell(squares[True])) if True in squares else 0.0
        return math.sqrt(squares.get(False, 0.0) + of_shards)


def _squares(tensors: Iterable[Tensor]) -> dict[bool, float]:
    """Sums of squares, by whether they are of shards."""
    found: dict[bool, list[Tensor]] = {}
    for t in tensors:
        square = torch.linalg.vector_norm(local(t), dtype=torch.float64).square()
        found.setdefault(is_shard(t), []).append(square)
    return {kind: float(torch.stack([of.to(all_[0].device) for of in all_]).sum()) for kind, all_ in found.items()}
