"""One step of each way to get the clipped sum, over the same model and rows.

A contestant is built from a ``Task`` and gives a step that returns what it computed (``Clipped``; None where nothing is
clipped). Norms are of the mean gradient over the K rows of an example, everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Inputs, losses
from dpfast import GhostClipper, Performance
from dpfast.clipping import StepPlan, plan_step
from dpfast.physical import Size, largest_fitting


@dataclass(frozen=True)
class Clipped:
    """Norms ``[B]`` and clipped sums by name."""

    norms: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """model: in training mode. inputs: of N = B * K rows. autocast: the dtype to compute in."""

    model: nn.Module
    inputs: Inputs
    examples: int
    augmult: int
    max_grad_norm: float
    dtype: torch.dtype = torch.float32

    def losses(self, model: nn.Module | None = None, inputs: Inputs | None = None) -> Tensor:
        """One per row, under autocast where the dtype asks for it."""
        given = self.inputs if inputs is None else inputs
        with torch.autocast(given[0].device.type, self.dtype, enabled=self.dtype != torch.float32):
            return losses(self.model if model is None else model, given)

    def rows(self, example: int) -> Inputs:
        own = slice(example * self.augmult, (example + 1) * self.augmult)
        return tuple(x[own] for x in self.inputs)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradient(self) -> dict[str, Tensor]:
        """What is in ``p.grad``."""
        return {name: p.grad for name, p in self.parameters().items() if p.grad is not None}

    def forget(self) -> None:
        """As an optimizer's ``zero_grad()``: every step makes its gradients anew."""
        for p in self.model.parameters():
            p.grad = None

    def factors(self, norms: Tensor) -> Tensor:
        return (self.max_grad_norm / norms).clamp(max=1)


Step = Callable[[], Clipped | None]
ALONE = Performance(form="example")  # what DPTrainer takes for a physical batch of one example
Contestant = Callable[[Task], Step]


def non_private(task: Task) -> Step:
    """The ordinary gradient of the mean loss."""

    def step() -> None:
        task.forget()
        task.losses().mean().backward()

    return step


def non_private_compiled(task: Task) -> Step:
    """The same, through ``torch.compile``; on the CPU without a layout optimization that makes gradients wrong."""
    on_cpu = task.inputs[0].device.type == "cpu"
    compiled = torch.compile(task.losses, options={"layout_optimization": False} if on_cpu else None)

    def step() -> None:
        task.forget()
        compiled().mean().backward()

    return step


def dpfast(performance: Performance) -> Contestant:
    """``GhostClipper`` with these settings, all rows at once."""

    def build(task: Task) -> Step:
        return private_step(task, performance, len(task.inputs[0]))

    return build


def dpfast_in_passes(like: int) -> Contestant:
    """Of one example as many rows at a time as fit the memory of a step of ``like`` rows, as ``DPTrainer`` does it."""

    def build(task: Task) -> Step:
        budget = planned(replace(task, augmult=like), ALONE, like).private.peak
        whole = Size(task.examples, task.augmult)
        size = largest_fitting(whole, lambda size: planned(task, ALONE, size.rows).peak <= budget)
        assert size is not None, f"not one row fits {budget} bytes"
        return private_step(task, ALONE, size.rows)

    return build


def planned(task: Task, performance: Performance, rows: int | None = None) -> StepPlan:
    """What dpfast predicts of a step, or of a pass over the first ``rows`` of one example."""

    def losses(model: nn.Module, *inputs: Tensor) -> Tensor:
        return task.losses(model, inputs)

    inputs = tuple(x[:rows] for x in task.inputs)
    part = rows is not None and rows < task.augmult
    return plan_step(task.model, losses, inputs, augmult=task.augmult, performance=performance, part=part)


def private_step(task: Task, performance: Performance, rows: int) -> Step:
    """rows: of a pass."""
    clipper = GhostClipper(task.model, max_grad_norm=task.max_grad_norm, augmult=task.augmult, performance=performance)
    every = len(task.inputs[0])

    def step() -> Clipped:
        clipper.zero_grad()
        with clipper:
            for first in range(0, every, rows):
                losses = task.losses(inputs=tuple(x[first : first + rows] for x in task.inputs))
                norms = clipper.backward(losses, more=first + rows < every).norms
        return Clipped(norms, task.gradient())

    return step


def example_at_a_time(task: Task) -> Step:
    """An ordinary backward pass for each example: no memory beyond one gradient."""
    parameters = task.parameters()

    def step() -> Clipped:
        task.forget()
        norms, sums = [], {name: torch.zeros_like(p) for name, p in parameters.items()}
        for i in range(task.examples):
            grads = torch.autograd.grad(task.losses(inputs=task.rows(i)).mean(), list(parameters.values()))
            norms.append(torch.stack(torch._foreach_norm(grads)).norm())
            torch._foreach_add_(list(sums.values()), torch._foreach_mul(grads, task.factors(norms[-1])))
        return Clipped(torch.stack(norms), sums)

    return step


def vmap(task: Task) -> Step:
    """``torch.func.vmap`` of the gradient, all examples at once."""
    parameters = {name: p.detach() for name, p in task.parameters().items()}
    shaped = tuple(x.unflatten(0, (task.examples, task.augmult)) for x in task.inputs)

    def loss(values: dict[str, Tensor], inputs: Inputs) -> Tensor:
        def call(*rows: Tensor) -> Any:
            return torch.func.functional_call(task.model, values, rows)

        return task.losses(call, inputs).mean()  # type: ignore[arg-type]

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")

    def step() -> Clipped:
        grads = gradient(parameters, shaped)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = task.factors(norms)
        return Clipped(norms, {name: torch.tensordot(factors, g, 1) for name, g in grads.items()})

    return step


def opacus_hooks(task: Task) -> Step:
    """Gradients of every row by Opacus' hooks, averaged over the rows of an example."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(contiguous(task.model), loss_reduction="sum", strict=False)

    def step() -> Clipped:
        wrapped.zero_grad(set_to_none=True)
        task.losses(wrapped).sum().backward()
        grads = {
            name: p.grad_sample.unflatten(0, (task.examples, task.augmult)).mean(1)
            for name, p in task.parameters().items()
        }
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = task.factors(norms)
        sums = {name: torch.tensordot(factors, g, 1) for name, g in grads.items()}
        for p in task.model.parameters():
            p.grad_sample = p.grad = None
        return Clipped(norms, sums)

    return step


def opacus_ghost(task: Task) -> Step:
    """Two backward passes; knows rows only, so K is 1."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        contiguous(task.model), loss_reduction="sum", strict=False, max_grad_norm=task.max_grad_norm
    )

    def step() -> Clipped:
        wrapped.zero_grad(set_to_none=True)
        rows = task.losses(wrapped)
        rows.sum().backward(retain_graph=True)
        norms = wrapped.get_norm_sample()
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (rows * task.factors(norms)).sum().backward()
        wrapped.enable_hooks()
        return Clipped(norms, task.gradient())

    return step


def contiguous(model: nn.Module) -> nn.Module:
    """Opacus understates norms of convolutions whose inputs lie channels-last, as they do after attention."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: tuple(x.contiguous() for x in args))
    return model
