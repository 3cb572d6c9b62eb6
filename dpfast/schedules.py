"""Learning rates by step: functions of its number alone, so that training goes on with those it would have had."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dpfast.errors import ConfigError

Schedule = Callable[[int], float] | Callable[[torch.optim.Optimizer], LRScheduler]


class LearningRates:
    """Of every step, for every parameter group, known before the first one.

    optimizer: with the learning rates to start from. schedule: a function from the number of steps before (0 for the
    first, as ``LambdaLR`` has it) to a factor; or what makes a scheduler of torch from an optimizer, such as ``lambda
    optimizer: CosineAnnealingLR(optimizer, T_max=100)``. A scheduler is stepped once a step, on a stand-in for the
    optimizer, which has its groups' learning rates and nothing else: what it does depends on no gradient and no loss.
    warmup_steps: over which a factor rises to 1 in equal parts, besides.

    A step that is lost to an interruption uses its rate up, as it uses its privacy up.

    Raises:
        ConfigError: rates that are no numbers of 0 or more, a schedule that is neither, that looks at losses
            (``ReduceLROnPlateau``), moves more than the learning rate, or ends before the steps do.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule | None, *, steps: int, warmup_steps: int
    ) -> None:
        self._initial = [group["lr"] for group in optimizer.param_groups]
        self._warmup_steps = warmup_steps
        self._factors: list[float] | None = None
        self._rates: list[list[float]] | None = None
        if schedule is not None:
            stand_in = _stand_in([float(rate) for rate in self._initial])
            made, problem = _made(schedule, stand_in)
            if made is None:
                self._factors = _factors(schedule, steps, problem)
            else:
                self._rates = _stepped(made, stand_in, steps)

    def at(self, step: int) -> list[float | Tensor]:
        """Of step ``step``, counted from 1, by parameter group; tensors where the optimizer has them so."""
        warm = min(1.0, step / max(1, self._warmup_steps))
        if self._rates is not None:
            rates = zip(self._initial, self._rates[step - 1], strict=True)
            return [_like(initial, rate * warm) for initial, rate in rates]
        factor = warm if self._factors is None else warm * self._factors[step - 1]
        return [initial * factor for initial in self._initial]


def _like(initial: float | Tensor, rate: float) -> float | Tensor:
    return torch.full_like(initial, rate) if isinstance(initial, Tensor) else rate


def _stand_in(rates: list[float]) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, momentum=0.9)  # some schedulers insist on a momentum


def _made(
    schedule: Callable[[Any], Any], optimizer: torch.optim.Optimizer
) -> tuple[LRScheduler | None, Exception | None]:
    """The scheduler, if the schedule makes one, or why it has not."""
    try:
        made = schedule(optimizer)
    except Exception as error:  # a function of a number may do anything with an optimizer
        return None, error
    if isinstance(made, ReduceLROnPlateau):
        raise ConfigError(
            "schedule: ReduceLROnPlateau looks at losses, which are private; use one that depends on the step alone,"
            " such as CosineAnnealingLR"
        )
    return (made, None) if isinstance(made, LRScheduler) else (None, None)


def _factors(schedule: Callable[[Any], Any], steps: int, problem: Exception | None) -> list[float]:
    found = []
    for step in range(steps):
        try:
            factor = float(schedule(step))
        except Exception as error:
            as_maker = f"; as what makes a scheduler it raises {_said(problem)}" if problem else ""
            raise ConfigError(
                "schedule: expected a function from the number of steps before to a factor, or from an optimizer to a"
                f" scheduler of torch; schedule({step}) raises {_said(error)}{as_maker}"
            ) from (problem or error)
        found.append(_checked(factor, step, "a factor"))
    return found


def _stepped(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    found, rest = [], _without_rates(optimizer)
    for step in range(steps):
        rates = [_checked(float(group["lr"]), step, "a learning rate") for group in optimizer.param_groups]
        found.append(rates)
        try:
            optimizer.step()
            if step < steps - 1:  # a schedule that is as long as the training has no further rate
                scheduler.step()
        except Exception as error:
            raise ConfigError(
                f"schedule: the scheduler has no rate for step {step + 2} of {steps} ({_said(error)}); give it as many"
                " steps as the plan has"
            ) from error
        if _without_rates(optimizer) != rest:
            raise ConfigError(
                "schedule: the scheduler moves more than the learning rate; turn that off (OneCycleLR(...,"
                " cycle_momentum=False))"
            )
    return found


def _without_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["momentum"] for group in optimizer.param_groups]


def _checked(value: float, step: int, what: str) -> float:
    if not 0 <= value < math.inf:
        raise ConfigError(f"schedule: {what} of {value!r} for the step after {step}: expected a number of 0 or more")
    return value


def _said(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"
