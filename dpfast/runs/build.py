"""From the values of a recipe to the objects that do the work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfast.checkpoint import weights_fingerprint
from dpfast.data import Augment, ImageSet
from dpfast.data.shards import ShardFolder
from dpfast.diffusion.edm import (
    EDMObjective,
    HeunSampler,
    Preconditioning,
    edm_scheduler,
    generate_edm,
    generate_edm_shards,
)
from dpfast.diffusion.finetune import attention_only, lora
from dpfast.diffusion.loading import load_unet, relabel
from dpfast.diffusion.models import NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.objective import DiffusionObjective
from dpfast.diffusion.pretrain import PretrainSpec
from dpfast.diffusion.sampler import generate, generate_shards, sampling_scheduler
from dpfast.diffusion.timesteps import MixtureOfUniforms, TimestepDistribution, Uniform
from dpfast.errors import ConfigError
from dpfast.evaluation import ClassifierObjective, ClassifierSpec
from dpfast.evaluation.extractors import Extractor, file_sha256, torchscript_extractor
from dpfast.objective import Objective
from dpfast.privacy.choice import choice_release
from dpfast.privacy.plan import Plan
from dpfast.privacy.releases import GaussianRelease
from dpfast.progress import Progress, silent
from dpfast.ranks import Ranks
from dpfast.recipes.schema import Baseline, Private, Recipe
from dpfast.runs.seeds import seed_for
from dpfast.trainer import DPTrainer


def initial_identity(recipe: Recipe) -> dict[str, Any]:
    """What tells the weights that pre-training begins with from others of the same name."""
    if recipe.pretrain.weights is None:
        return {}
    return {"initial weights": weights_fingerprint(load_unet(recipe.pretrain.weights))}


def extractor_file(recipe: Recipe) -> Extractor | None:
    """What ``evaluate.extractor`` names; FileError if it is no TorchScript file."""
    path, device = recipe.evaluate.extractor, recipe.performance.device
    return None if path is None else torchscript_extractor(path, device=device)


def extractor_identity(recipe: Recipe) -> dict[str, Any]:
    """What tells it from another one in the same place."""
    path = recipe.evaluate.extractor
    return {} if path is None else {"extractor": file_sha256(Path(path))}


def without_paths(recipe: Recipe) -> Recipe:
    """The same without what it tells of this machine, to be given away."""
    weights = recipe.pretrain.weights
    pretrain = replace(recipe.pretrain, weights=None if weights is None else Path(weights).name)
    extractor = recipe.evaluate.extractor
    evaluate = replace(recipe.evaluate, extractor=None if extractor is None else Path(extractor).name)
    return replace(recipe, data=replace(recipe.data, folder="data"), pretrain=pretrain, evaluate=evaluate)


def unet(recipe: Recipe, images: ImageSet) -> Any:
    """An untrained UNet2DModel for images of this shape and these classes."""
    channels, height, _ = images.image_shape
    spec = UNetSpec(image_size=height, channels=channels, num_classes=images.num_classes, **vars(recipe.model))
    return build_unet(spec, seed=seed_for(recipe, "model"))


def initial_unet(recipe: Recipe, images: ImageSet) -> Any:
    """What pre-training on ``images`` begins with: random weights, or ``pretrain.weights`` with as many classes."""
    if recipe.pretrain.weights is None:
        return unet(recipe, images)
    model = load_unet(recipe.pretrain.weights)
    fits = model.config["num_class_embeds"] == images.num_classes + 1
    return model if fits else relabelled(recipe, model, images)


def relabelled(recipe: Recipe, model: Any, images: ImageSet) -> Any:
    """The same network, with a new class embedding for the classes of ``images``."""
    return relabel(model, images.num_classes, seed=seed_for(recipe, "model"))


def tuned(recipe: Recipe, model: Any) -> Any:
    """The pre-trained network with what ``private.method`` trains left to move, and all else frozen."""
    seed, rank = seed_for(recipe, "private"), recipe.private.rank
    match recipe.private.method:
        case "attention":
            return attention_only(model, class_embedding=True)
        case "lora":
            return lora(model, rank, class_embedding=True, seed=seed)
    return model


def scheduler(recipe: Recipe) -> Any:
    """The noising process, a diffusers scheduler."""
    if recipe.diffusion.process == "edm":
        return edm_scheduler(preconditioning(recipe))
    return build_scheduler(
        NoiseSpec(
            num_train_timesteps=recipe.diffusion.num_train_timesteps,
            beta_schedule=recipe.diffusion.schedule,
            prediction_type=recipe.diffusion.prediction,
        )
    )


def preconditioning(recipe: Recipe) -> Preconditioning:
    """Of the process "edm"."""
    return Preconditioning(recipe.diffusion.sigma_data)


def public_objective(recipe: Recipe, images: ImageSet) -> DiffusionObjective | EDMObjective:
    """The loss of pre-training: uniform timesteps, or the process's own noise levels; no augmentation."""
    return _objective(recipe, images, Uniform())


def private_objective(recipe: Recipe, images: ImageSet) -> DiffusionObjective | EDMObjective:
    """The loss of private fine-tuning."""
    augment = Augment(flip=recipe.private.flip, shift=recipe.private.shift)
    return _objective(recipe, images, timesteps(recipe), stratified=recipe.private.stratified, augment=augment)


def _objective(
    recipe: Recipe, images: ImageSet, timesteps: TimestepDistribution, **options: Any
) -> DiffusionObjective | EDMObjective:
    diffusion = recipe.diffusion
    options |= {"num_classes": images.num_classes, "label_drop": diffusion.label_drop}
    if diffusion.process == "edm":
        options |= {"p_mean": diffusion.p_mean, "p_std": diffusion.p_std}
        return EDMObjective(preconditioning=preconditioning(recipe), **options)
    return DiffusionObjective(scheduler=scheduler(recipe), timesteps=timesteps, **options)


def timesteps(recipe: Recipe) -> TimestepDistribution:
    """The timestep distribution of private fine-tuning."""
    mixture = recipe.private.timesteps
    return MixtureOfUniforms([(w, int(low), int(high)) for w, low, high in mixture]) if mixture else Uniform()


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from the model, with all that ``[sample]`` says given already.

    images: ``(model, labels=..., image_shape=..., num_classes=...) -> images``. shards: ``(model, folder=...,
    image_shape=..., classes=...) -> ShardFolder``. Both take what their function has beside. calls: of the model for an
    image, without guidance.
    """

    images: Callable[..., Tensor]
    shards: Callable[..., ShardFolder]
    calls: int


def sampling(recipe: Recipe, part: str = "sample") -> Sampling:
    """By ``sample.sampler``, from the seed of that part. Raises ``ConfigError`` for steps that it cannot take."""
    sample = recipe.sample
    files: dict[str, Any] = {"count": sample.count, "shard_size": sample.shard_size}
    files |= {"compile": sample.compile, "devices": sample.devices}
    options: dict[str, Any] = {"guidance": sample.guidance, "batch_size": sample.batch_size}
    options |= {"dtype": getattr(torch, sample.dtype), "seed": seed_for(recipe, part)}
    if sample.sampler == "heun":
        heun = HeunSampler(steps=sample.steps)
        options |= {"sampler": heun, "preconditioning": preconditioning(recipe)}
        return Sampling(partial(generate_edm, **options), partial(generate_edm_shards, **options, **files), heun.calls)
    options |= {"scheduler": scheduler(recipe), "sampler": sample.sampler, "steps": sample.steps}
    sampling_scheduler(options["scheduler"], sample.sampler, sample.steps)
    return Sampling(partial(generate, **options), partial(generate_shards, **options, **files), sample.steps)


def pretrain_spec(recipe: Recipe) -> PretrainSpec:
    """Steps, batch size and learning rate of pre-training."""
    values = {name: value for name, value in vars(recipe.pretrain).items() if name != "weights"}
    return PretrainSpec(**values, seed=seed_for(recipe, "pretrain"))


def plan(recipe: Recipe, dataset_size: int) -> Plan:
    """The privacy of the released model."""
    training = recipe.private
    if not training.choices:
        return _plan(recipe, training, dataset_size)
    release = choice_release(settings=training.choices, sigma=training.choice_noise)
    try:
        return _plan(recipe, training, dataset_size, [release])
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n(recipe keys private.choices = {training.choices} and private.choice_noise ="
            f" {training.choice_noise:g}: a choice among fewer, or with more noise, costs less)"
        ) from error


def baseline_plan(recipe: Recipe, dataset_size: int) -> Plan:
    """The privacy of the baseline classifier: another way to spend the same epsilon and delta."""
    return _plan(recipe, recipe.baseline, dataset_size)


def _plan(
    recipe: Recipe, training: Private | Baseline, dataset_size: int, other_releases: Sequence[GaussianRelease] = ()
) -> Plan:
    return Plan(
        dataset_size=dataset_size,
        expected_batch_size=training.sample_rate * dataset_size,
        max_grad_norm=training.max_grad_norm,
        steps=training.steps,
        target_epsilon=recipe.private.target_epsilon,
        target_delta=recipe.private.target_delta,
        neighboring=recipe.private.neighboring,
        other_releases=other_releases,
        noise=recipe.private.noise,
    )


def classifier_spec(recipe: Recipe) -> ClassifierSpec:
    """Training of every classifier that is not private."""
    own = (
        "steps",
        "batch_size",
        "learning_rate",
        "network",
        "norm",
        "optimizer",
        "weight_decay",
        "warp",
        "pixel_noise",
    )
    values = {name: getattr(recipe.evaluate, name) for name in own}
    return ClassifierSpec(**values, augment=Augment(flip=recipe.evaluate.flip, shift=recipe.evaluate.crop, fill=-1.0))


def classifier_seeds(recipe: Recipe) -> tuple[int, ...]:
    """Of the classifiers of which each figure is the mean."""
    return tuple(seed_for(recipe, "classifier") + 100 * index for index in range(recipe.evaluate.seeds))


def counts(recipe: Recipe) -> tuple[int, ...]:
    """Numbers of synthetic images that classifiers are trained on: those of ``evaluate.counts`` below all, and all.

    Raises ConfigError for numbers that do not rise.
    """
    found = recipe.evaluate.counts
    if any(low >= high for low, high in itertools.pairwise((0, *found))):
        raise ConfigError(f"recipe key evaluate.counts = {list(found)}: expected numbers of images above 0 that rise")
    return (*(count for count in found if count < recipe.sample.count), recipe.sample.count)


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
    unsafe_debug: bool = False,
    ranks: Ranks | None = None,
) -> DPTrainer:
    """DP-SGD as ``[private]`` or ``[baseline]`` says.

    unsafe_debug: of ``[private]``, for the one training whose ledger the released statement is made from.
    """
    return DPTrainer(
        model.train(),
        dataset,
        plan,
        objective=objective,
        seed=seed,
        state_dir=state_dir,
        progress=progress,
        unsafe_debug=unsafe_debug,
        ranks=ranks,
        **training_options(recipe, training),
    )


def training_options(recipe: Recipe, training: Private | Baseline) -> dict[str, Any]:
    """What ``DPTrainer`` takes of them, beside the plan and the objective."""
    own = {"clipping": training.clipping, "stability": training.stability} if isinstance(training, Private) else {}
    return own | {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=training.learning_rate),
        "augmult": training.augmult,
        "performance": recipe.performance,
        "ema_decay": training.ema_decay,
        "warmup_steps": training.warmup_steps,
    }


def classifier_objective(recipe: Recipe) -> ClassifierObjective:
    """The loss of the baseline classifier, under shifts; beyond the border lies background."""
    return ClassifierObjective(augment=Augment(shift=recipe.baseline.shift, fill=-1.0))
