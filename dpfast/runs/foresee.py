"""What a run would take on devices that need not be here: predicted from the planner's traces, nothing is run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpfast.clipping.planner import StepPlan
from dpfast.data import ImageSet
from dpfast.kernels.rates import DEVICES
from dpfast.physical import Size, usual_size
from dpfast.privacy.plan import Plan
from dpfast.recipes.schema import Recipe
from dpfast.runs import build
from dpfast.runs.elsewhere import state_bytes
from dpfast.runs.estimate import image_passes
from dpfast.runs.run import Run
from dpfast.trainer import DPTrainer

HERE = "this CPU"


@dataclass(frozen=True)
class Foreseen:
    """seconds: of the stages that run the diffusion model. step: of a private step. memory: bytes of it at its peak.
    parameters, trained: of the model, and how many of them privately.
    """

    device: str
    seconds: dict[str, float]
    step: float
    memory: int
    parameters: int
    trained: int


def foresee(run: Run) -> list[Foreseen]:
    """Of this machine's CPU, and of every GPU of which rates are known (assumed, not measured)."""
    trainer = trainer_to_plan(run.recipe, run.private, run.plan)
    return [_on(run, trainer, device) for device in (HERE, *DEVICES)]


def trainer_to_plan(recipe: Recipe, private: ImageSet, plan: Plan) -> DPTrainer:
    """Of a private training that is not carried out, whatever device it is for."""
    return build.private_trainer(
        replace(recipe, performance=replace(recipe.performance, device="cpu")),  # fake tensors stand for the device's
        recipe.private,
        build.tuned(recipe, build.unet(recipe, private)),
        private,
        plan,
        build.private_objective(recipe, private),
    )


def physical_batch(recipe: Recipe, trainer: DPTrainer, private: ImageSet, device: str) -> tuple[Size, StepPlan]:
    """As ``DPTrainer`` makes it on ``device``, and what a pass of it costs there."""
    kind, elsewhere = ("cpu", None) if device == HERE else ("cuda", device)
    there, numbers = replace(recipe.performance, device=kind), math.prod(private.image_shape)
    usual = usual_size(there, trainer.augmult, numbers, trainer.plan.expected_batch_size, trainer.plan.dataset_size)
    size = trainer.fitting(usual, device=elsewhere)
    return size, trainer.plan_step(size, device=elsewhere)


def _on(run: Run, trainer: DPTrainer, device: str) -> Foreseen:
    """What is not private takes what its ordinary step does."""
    size, plan = physical_batch(run.recipe, trainer, run.private, device)
    rows = size.examples * size.rows
    private, ordinary = plan.private.seconds / rows, plan.ordinary.seconds / rows
    passes = image_passes(run)
    seconds = {
        "pretrain": passes["pretrain"] * ordinary,
        "train": passes["train"] * private,
        "sample": passes["sample"] * ordinary / 3,  # forward alone
    }
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    return Foreseen(
        device=device,
        seconds=seconds,
        step=seconds["train"] / run.plan.steps,
        memory=plan.peak + state_bytes(trainer.model),
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
    )
