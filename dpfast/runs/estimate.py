"""What a run will cost, from a few steps of each kind on random images: no private image is looked at."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpfast.data import ImageSet, RowKeys
from dpfast.evaluation import ClassifierSpec, build_classifier, train_classifier
from dpfast.objective import Objective
from dpfast.physical import usual_size
from dpfast.privacy.plan import Plan
from dpfast.recipes.schema import Baseline, Private, Recipe
from dpfast.runs import build
from dpfast.runs.run import Run

_PHYSICAL_BATCHES = 4  # of a private step that are timed; a longer step is scaled up from them


@dataclass(frozen=True)
class Estimate:
    """image_passes: by stage, forward and backward (sampling: forward only). seconds: by stage.

    memory: bytes that this process has needed at its peak, libraries included, or those of the GPU in use.
    """

    image_passes: dict[str, int]
    seconds: dict[str, float]
    memory: int


def estimate(run: Run) -> Estimate:
    """Measured on this machine; expect half to twice of it."""
    recipe = run.recipe
    model = build.tuned(recipe, build.unet(recipe, run.private)).to(recipe.performance.device)
    classifier = build_classifier(run.private, ClassifierSpec(), seed=0)
    training = _Measured(run, recipe.private, run.plan, model, build.private_objective(recipe, run.private))
    rival = _Measured(run, recipe.baseline, run.baseline_plan, classifier, build.classifier_objective(recipe))
    public, ordinary = build.public_classifier_spec(recipe), build.classifier_spec(recipe)
    classifiers, passes = _classifiers(recipe), image_passes(run)
    seconds = {
        "pretrain": recipe.pretrain.steps * _timed(_public_step(run, model)),
        "train": training.seconds(),
        "sample": passes["sample"] * _sampling_time(run, model),
        "baseline": rival.seconds(),
        "evaluate": classifiers * _classifier_time(run, ordinary),
    }
    seconds[_maker(recipe)] += _classifier_time(run, public)
    return Estimate(passes, seconds, _peak_memory(recipe.performance.device))


def image_passes(run: Run) -> dict[str, int]:
    """By stage, forward and backward (sampling: forward only)."""
    recipe = run.recipe
    public, ordinary = build.public_classifier_spec(recipe), build.classifier_spec(recipe)
    passes = {
        "pretrain": recipe.pretrain.steps * recipe.pretrain.batch_size,
        "train": _private_passes(run.plan, recipe.private),
        "sample": 2 * recipe.sample.count * build.sampling(recipe).calls * (1 if recipe.sample.guidance == 1 else 2),
        "baseline": _private_passes(run.baseline_plan, recipe.baseline),
        "evaluate": _classifiers(recipe) * ordinary.steps * ordinary.batch_size,
    }
    passes[_maker(recipe)] += public.steps * public.batch_size
    return passes


def _classifiers(recipe: Recipe) -> int:
    """On synthetic images of each count, on public samples and on real images."""
    return (len(build.counts(recipe)) + 2) * recipe.evaluate.seeds


def _private_passes(plan: Plan, training: Private | Baseline) -> int:
    return round(plan.steps * plan.expected_batch_size) * training.augmult


def _maker(recipe: Recipe) -> str:
    """The stage that needs the public classifier first, and makes it."""
    return "baseline" if recipe.baseline.pretrained else "evaluate"


@dataclass(frozen=True)
class _Measured:
    """A private training whose first steps are taken, on random images, by the trainer that the run will use."""

    run: Run
    training: Private | Baseline
    plan: Plan
    model: nn.Module
    objective: Objective

    def seconds(self) -> float:
        """Of every step of the plan."""
        wanted = self.plan.expected_batch_size
        batch = min(wanted, _PHYSICAL_BATCHES * self._physical_batch())
        seconds = self._step(batch)
        if batch < wanted:  # not in proportion: noise and update cost the same whatever the batch
            per_image = (seconds - self._step(batch / 2)) / (batch / 2)
            seconds += max(0.0, per_image) * (wanted - batch)
        return self.plan.steps * seconds

    def _physical_batch(self) -> int:
        """Images of it, as ``DPTrainer`` chooses them."""
        performance, numbers = self.run.recipe.performance, math.prod(self.run.private.image_shape)
        expected, most = self.plan.expected_batch_size, self.plan.dataset_size
        return usual_size(performance, self.training.augmult, numbers, expected, most).examples

    def _step(self, batch: float) -> float:
        """Seconds of a step with so many images on average: the mean of two, after one to warm up."""
        images = min(len(self.run.private), math.ceil(2 * batch))
        ticks: list[float] = []
        trainer = build.private_trainer(
            self.run.recipe,
            self.training,
            self.model,
            _random_images(self.run, images),
            Plan(
                dataset_size=images,
                expected_batch_size=min(batch, images),
                max_grad_norm=self.plan.max_grad_norm,
                steps=3,
                target_delta=0.5 / images,
                noise_multiplier=1.0,
            ),
            self.objective,
            progress=lambda *_: ticks.append(_now()),
        )
        trainer.fit()
        return (ticks[-1] - ticks[0]) / (len(ticks) - 1)


def _random_images(run: Run, count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *run.private.image_shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % run.private.num_classes
    return ImageSet(images, labels, run.private.classes)


def _public_step(run: Run, model: nn.Module) -> Callable[[], None]:
    size, device = run.recipe.pretrain.batch_size, run.recipe.performance.device
    batch, objective = _random_images(run, size), build.public_objective(run.recipe, run.private)
    keys = RowKeys(0, torch.arange(size, device=device), 0)

    def step() -> None:
        model.zero_grad()
        objective(model, batch.images.to(device), batch.labels.to(device), keys).mean().backward()

    return step


def _sampling_time(run: Run, model: nn.Module) -> float:
    """Seconds for one image and one call of the model."""
    sample = replace(run.recipe.sample, steps=2, guidance=1.0)
    sampling, count = build.sampling(replace(run.recipe, sample=sample)), min(sample.batch_size, sample.count)

    def draw() -> None:
        sampling.images(
            model,
            labels=_random_images(run, count).labels,
            image_shape=run.private.image_shape,
            num_classes=run.private.num_classes,
        )

    return _timed(draw) / (count * sampling.calls)


def _classifier_time(run: Run, spec: ClassifierSpec) -> float:
    """Seconds for one ordinary classifier."""
    images, few = _random_images(run, spec.batch_size), replace(spec, steps=4)
    return spec.steps * _timed(lambda: train_classifier(images, spec=few, seed=0)) / few.steps


def _timed(step: Callable[[], Any]) -> float:
    """The faster of two calls, after one to warm up."""
    step()
    taken = []
    for _ in range(2):
        start = _now()
        step()
        taken.append(_now() - start)
    return min(taken)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
