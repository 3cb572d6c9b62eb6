"""A private step beside the ordinary step of the same model and rows, on this machine: ``dpfast bench``."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpfast.clipping import GhostClipper, plan_step
from dpfast.clipping.planner import Losses, StepPlan
from dpfast.kernels import cost
from dpfast.measure import interleaved, peak_storages, ratio
from dpfast.performance import Performance
from dpfast.progress import Progress, silent

ORDINARY, PRIVATE = "ordinary step", "private step"
SLOW = 3.0  # a form that is predicted to take so many times the ordinary step is not run


@dataclass(frozen=True)
class Measured:
    """seconds: of a step, median over the rounds. time: median of its ratio to the ordinary step within a round. peak:
    bytes of tensors that a step holds at a time, beyond the model. planned_time, planned_peak: what the planner said.

    skipped: why there is nothing but a prediction.
    """

    name: str
    planned_time: float
    planned_peak: int
    seconds: float | None = None
    time: float | None = None
    peak: int | None = None
    skipped: str | None = None


def bench(
    model: nn.Module,
    losses: Losses,
    inputs: tuple[Tensor, ...],
    *,
    augmult: int = 1,
    performance: Performance | None = None,
    rounds: int = 7,
    progress: Progress = silent,
) -> list[Measured]:
    """The ordinary step, the private one, and the private one with each form for all weights.

    A form is not run where it is predicted to take more than ``SLOW`` times the ordinary step, or more than the memory
    budget.
    losses: ``losses(model, *inputs) -> [B*K]``. The model's gradients are discarded, its weights stay as they are.
    """
    performance = performance or Performance()
    forms = [form for form in cost.FORMS if form != performance.form]
    settings = {PRIVATE: performance} | {f"all {form}": Performance(form=form) for form in forms}
    plans = {
        name: plan_step(model, losses, inputs, augmult=augmult, performance=each) for name, each in settings.items()
    }
    reasons = {name: why_not(plan, performance.memory_budget) for name, plan in plans.items() if name != PRIVATE}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    steps: dict[str, Callable[[], object]] = {ORDINARY: _ordinary(model, losses, inputs)}
    for name, each in settings.items():
        if name not in skipped:
            steps[name] = _private(model, losses, inputs, augmult, each)
    seconds = interleaved(steps, rounds=rounds, progress=progress)
    peaks = {name: peak_storages(step) for name, step in steps.items()}
    model.zero_grad()
    ordinary = plans[PRIVATE].ordinary
    planned = {ORDINARY: (1.0, ordinary.peak)} | {name: (p.ratio(), p.private.peak) for name, p in plans.items()}
    return [
        Measured(name, *planned[name], skipped=skipped[name])
        if name in skipped
        else Measured(
            name,
            *planned[name],
            seconds=statistics.median(seconds[name]),
            time=ratio(seconds, name, ORDINARY),
            peak=peaks[name],
        )
        for name in planned
    ]


def why_not(plan: StepPlan, memory_budget: int | None = None) -> str | None:
    """Why a form is not run for all weights, if it is not."""
    if plan.ratio() > SLOW:
        return f"predicted {plan.ratio():.1f} times"
    if memory_budget is not None and plan.peak > memory_budget:
        return f"predicted {plan.peak / 1e6:,.1f} MB, over the budget"
    return None


def _ordinary(model: nn.Module, losses: Losses, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        losses(model, *inputs).mean().backward()

    return step


def _private(
    model: nn.Module, losses: Losses, inputs: tuple[Tensor, ...], augmult: int, performance: Performance
) -> Callable[[], object]:
    clipper = GhostClipper(model, max_grad_norm=1.0, augmult=augmult, performance=performance)

    def step() -> None:
        clipper.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when the model is trained
            with clipper:
                clipper.backward(losses(model, *inputs))

    return step


def as_table(measured: list[Measured]) -> Iterator[str]:
    """Lines of a table: milliseconds, time and peak memory relative to the ordinary step, and what was predicted."""
    base = next(m for m in measured if m.name == ORDINARY)
    assert base.peak is not None
    yield f"{'':16}{'ms':>10}{'time':>8}{'planned':>9}{'MB':>10}{'memory':>8}{'planned':>9}"
    for m in measured:
        predicted = m.planned_peak / base.planned_peak
        if m.seconds is None or m.time is None or m.peak is None:
            yield f"{m.name:16}{'':10}{'':8}{m.planned_time:9.2f}{'':10}{'':8}{predicted:9.2f}  not run: {m.skipped}"
            continue
        time = f"{1e3 * m.seconds:10,.1f}{m.time:8.2f}{m.planned_time:9.2f}"
        yield f"{m.name:16}{time}{m.peak / 1e6:10,.1f}{m.peak / base.peak:8.2f}{predicted:9.2f}"


def environment() -> str:
    """What the numbers depend on, in a line."""
    from dpfast.kernels.dispatch import backend

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {backend()} kernels"
