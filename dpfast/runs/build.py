"""From the values of a recipe to the objects that do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpfast.data import Augment, ImageSet, font_digits, real_digits
from dpfast.diffusion.loading import load_unet as load_unet  # noqa: PLC0414  # used as build.load_unet
from dpfast.diffusion.models import NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.objective import DiffusionObjective
from dpfast.diffusion.pretrain import PretrainSpec
from dpfast.diffusion.timesteps import MixtureOfUniforms, TimestepDistribution, Uniform
from dpfast.evaluation import ClassifierObjective, ClassifierSpec
from dpfast.objective import Objective
from dpfast.privacy.plan import Plan
from dpfast.progress import Progress, silent
from dpfast.recipes.schema import Baseline, Private, Recipe
from dpfast.trainer import DPTrainer

# Parts of a run that draw at random from the recipe's seed do so from streams of their own.
SEEDS = {
    "model": 0,
    "public data": 1,
    "pretrain": 2,
    "private": 3,
    "sample": 4,
    "classifier": 5,
    "baseline": 6,
}


def seed_for(recipe: Recipe, part: str) -> int:
    """The seed of one part of the run."""
    return recipe.seed * 1000 + SEEDS[part]


def private_data(recipe: Recipe) -> ImageSet:
    """The images to protect."""
    return real_digits("train", fold=recipe.data.fold)


def test_data(recipe: Recipe) -> ImageSet:
    """The images that accuracies are measured on: the test split, or with ``data.fold`` that fold."""
    return real_digits("test", fold=recipe.data.fold)


def public_data(recipe: Recipe) -> ImageSet:
    """The images that the model is pre-trained on."""
    size = private_data(recipe).image_shape[-1]
    return font_digits(recipe.data.public_count, seed=seed_for(recipe, "public data"), size=size)


def unet(recipe: Recipe, images: ImageSet) -> Any:
    """An untrained UNet2DModel for images of this shape and these classes."""
    channels, height, _ = images.image_shape
    spec = UNetSpec(image_size=height, channels=channels, num_classes=images.num_classes, **vars(recipe.model))
    return build_unet(spec, seed=seed_for(recipe, "model"))


def scheduler(recipe: Recipe) -> Any:
    """The noising process, a diffusers scheduler."""
    return build_scheduler(
        NoiseSpec(
            num_train_timesteps=recipe.diffusion.num_train_timesteps,
            beta_schedule=recipe.diffusion.schedule,
            prediction_type=recipe.diffusion.prediction,
        )
    )


def public_objective(recipe: Recipe, images: ImageSet) -> DiffusionObjective:
    """The loss of pre-training: uniform timesteps, no augmentation."""
    return DiffusionObjective(
        scheduler=scheduler(recipe), num_classes=images.num_classes, label_drop=recipe.diffusion.label_drop
    )


def private_objective(recipe: Recipe, images: ImageSet) -> DiffusionObjective:
    """The loss of private fine-tuning."""
    return DiffusionObjective(
        scheduler=scheduler(recipe),
        num_classes=images.num_classes,
        label_drop=recipe.diffusion.label_drop,
        timesteps=timesteps(recipe),
        stratified=recipe.private.stratified,
        augment=Augment(flip=recipe.private.flip, shift=recipe.private.shift),
    )


def timesteps(recipe: Recipe) -> TimestepDistribution:
    """The timestep distribution of private fine-tuning."""
    mixture = recipe.private.timesteps
    return MixtureOfUniforms([(w, int(low), int(high)) for w, low, high in mixture]) if mixture else Uniform()


def pretrain_spec(recipe: Recipe) -> PretrainSpec:
    """Steps, batch size and learning rate of pre-training."""
    return PretrainSpec(**vars(recipe.pretrain), seed=seed_for(recipe, "pretrain"))


def plan(recipe: Recipe, dataset_size: int) -> Plan:
    """The privacy of the released model."""
    return _plan(recipe, recipe.private, dataset_size)


def baseline_plan(recipe: Recipe, dataset_size: int) -> Plan:
    """The privacy of the baseline classifier: another way to spend the same epsilon and delta."""
    return _plan(recipe, recipe.baseline, dataset_size)


def _plan(recipe: Recipe, training: Private | Baseline, dataset_size: int) -> Plan:
    return Plan(
        dataset_size=dataset_size,
        expected_batch_size=training.sample_rate * dataset_size,
        max_grad_norm=training.max_grad_norm,
        steps=training.steps,
        target_epsilon=recipe.private.target_epsilon,
        target_delta=recipe.private.target_delta,
        neighboring=recipe.private.neighboring,
    )


def classifier_spec(recipe: Recipe) -> ClassifierSpec:
    """Training of every classifier that is not private."""
    return ClassifierSpec(
        steps=recipe.evaluate.steps,
        batch_size=recipe.evaluate.batch_size,
        learning_rate=recipe.evaluate.learning_rate,
    )


def public_classifier_spec(recipe: Recipe) -> ClassifierSpec:
    """Training of the public images' classifier: feature extractor, and where the baseline starts."""
    return ClassifierSpec(steps=recipe.evaluate.extractor_steps)


def private_trainer(
    recipe: Recipe,
    training: Private | Baseline,
    model: torch.nn.Module,
    dataset: ImageSet,
    plan: Plan,
    objective: Objective,
    *,
    seed: int = 0,
    state_dir: Path | None = None,
    progress: Progress = silent,
) -> DPTrainer:
    """DP-SGD as ``[private]`` or ``[baseline]`` says."""
    return DPTrainer(
        model.train(),
        dataset,
        plan,
        objective=objective,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=training.learning_rate),
        augmult=training.augmult,
        seed=seed,
        performance=recipe.performance,
        state_dir=state_dir,
        ema_decay=training.ema_decay,
        warmup_steps=training.warmup_steps,
        progress=progress,
    )


def classifier_objective(recipe: Recipe) -> ClassifierObjective:
    """The loss of the baseline classifier, under shifts; beyond the border lies background."""
    return ClassifierObjective(augment=Augment(shift=recipe.baseline.shift, fill=-1.0))
