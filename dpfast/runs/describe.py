"""What the commands ``account``, ``plan``, ``bench`` and ``--dry-run`` print."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from dpfast.errors import ConfigError
from dpfast.privacy.accounting import Neighboring, accountant_name, rdp_noise_multiplier, rounded_up
from dpfast.privacy.plan import Plan
from dpfast.progress import Progress, duration
from dpfast.recipes.schema import Recipe

if TYPE_CHECKING:
    from dpfast.runs.run import Run
    from dpfast.trainer import DPTrainer

Rows = list[tuple[str, str]]


def account(
    *,
    steps: int,
    delta: float,
    sample_rate: float | None,
    batch_size: float | None,
    dataset_size: int | None,
    noise_multiplier: float | None,
    epsilon: float | None,
    neighboring: str,
) -> Rows:
    """Epsilon from the noise multiplier, or the other way round.

    Raises:
        ConfigError: not exactly one of the two, or the sampling is not given one way or the other.
    """
    rate = _sample_rate(sample_rate, batch_size, dataset_size)
    if (noise_multiplier is None) == (epsilon is None):
        raise ConfigError("give exactly one of --noise-multiplier (to find epsilon) and --epsilon")
    # The data set's size does not enter epsilon beyond the sampling rate; without one, one that delta allows.
    size = dataset_size or max(1, math.ceil(1 / delta) - 1 if 0 < delta < 1 else 1)
    plan = Plan(
        dataset_size=size,
        expected_batch_size=rate * size,
        max_grad_norm=1.0,
        steps=steps,
        target_delta=delta,
        target_epsilon=epsilon,
        noise_multiplier=cast(float, noise_multiplier),
        neighboring=cast(Neighboring, neighboring),
    )
    return [
        ("epsilon", _figure(plan.epsilon())),
        ("delta", f"{delta:g}"),
        ("noise multiplier", f"{plan.noise_multiplier:g}"),
        ("sampling rate", f"{rate:g} (Poisson)"),
        ("steps", str(steps)),
        ("neighbours", neighboring),
        ("accountant", accountant_name()),
    ]


def _sample_rate(sample_rate: float | None, batch_size: float | None, dataset_size: int | None) -> float:
    if sample_rate is not None and batch_size is None:
        rate = sample_rate
    elif sample_rate is None and batch_size is not None and dataset_size:
        rate = batch_size / dataset_size
    else:
        raise ConfigError("give either --sample-rate, or both --batch-size and --dataset-size")
    if not 0 < rate <= 1:
        raise ConfigError(f"sampling rate {rate:g}: expected above 0 and at most 1")
    return rate


def describe_plan(recipe: Recipe) -> Rows:
    """The plan of a recipe."""
    from dpfast.runs import build, inputs

    plan = build.plan(recipe, len(inputs.private_data(recipe)))
    curve = plan.epsilon_curve(5) if plan.is_private else []
    return [
        ("private images", str(plan.dataset_size)),
        ("expected batch", f"{plan.expected_batch_size:g} images, sampling rate {plan.sample_rate:g} (Poisson)"),
        ("steps", str(plan.steps)),
        ("augmentations", f"{recipe.private.augmult} of each image, averaged before clipping"),
        ("clip norm", f"{plan.max_grad_norm:g}"),
        ("noise multiplier", _noise(plan)),
        ("epsilon", f"{_figure(plan.epsilon())} at delta {plan.target_delta:g}"),
        ("neighbours", plan.neighboring),
        (
            "by step",
            ", ".join(f"{step}: {rounded_up(value, 2):.2f}" for step, value in curve) or "no noise: NOT PRIVATE",
        ),
        ("fingerprint", plan.fingerprint()),
    ]


def describe_step(recipe: Recipe, device: str | None = None) -> str:
    """One physical batch of the private training: the form of each weight, predicted time and memory.

    device: one that need not be here, instead of the recipe's.
    """
    trainer = _trainer(recipe)
    elsewhere = "" if device is None else f" from assumed rates (dpfast plan --device {device} names them)"
    return f"{_physical_batch(trainer, device)}, predicted{elsewhere}:\n{trainer.plan_step(device=device)}"


def describe_bench(recipe: Recipe, rounds: int, progress: Progress) -> Iterator[str]:
    """The same measured, on images of zeros: time and memory beside the ordinary step."""
    from dpfast.bench import as_table, bench, environment

    trainer = _trainer(recipe)
    yield f"{_physical_batch(trainer)}; {environment()}"
    losses, examples = trainer.physical_losses()
    size = trainer.physical_size
    yield from as_table(
        bench(
            trainer.model,
            losses,
            examples,
            augmult=size.rows,  # where an example goes in passes: one of them
            performance=trainer.performance_of(size.examples),
            rounds=rounds,
            progress=progress,
        )
    )


def _trainer(recipe: Recipe) -> DPTrainer:
    from dpfast.runs import build, inputs

    data = inputs.private_data(recipe)
    model, plan = build.tuned(recipe, build.unet(recipe, data)), build.plan(recipe, len(data))
    return build.private_trainer(recipe, recipe.private, model, data, plan, build.private_objective(recipe, data))


def _physical_batch(trainer: DPTrainer, device: str | None = None) -> str:
    size = trainer.physical_size
    passes = " at a time" if size.rows < trainer.augmult else ""
    images = f"{size.examples} image{'s' if size.examples > 1 else ''} of {size.rows} augmentations{passes}"
    return f"a physical batch on {device or trainer.performance.device}, {images}"


def describe_cost(run: Run) -> Iterator[tuple[str, str]]:
    """What a run will cost: epsilon exactly; time and memory as predicted for some devices and, where a step takes less
    than ``_MEASURED`` seconds here, as measured on some.
    """
    from dpfast.runs.estimate import estimate, image_passes
    from dpfast.runs.foresee import HERE, foresee

    yield "epsilon", f"{_figure(run.plan.epsilon())} at delta {run.plan.target_delta:g}"
    yield "noise multiplier", _noise(run.plan)
    if run.plan.other_releases:
        yield (
            "a noised choice",
            f"of that epsilon {_figure(run.plan.epsilon(0))} is set aside for it before the first step",
        )
    yield "image passes", ", ".join(f"{name} {count:,}" for name, count in image_passes(run).items())
    yield "baseline", "a DP-SGD classifier with a budget of its own, to compare with; it is not released"
    foreseen = {of.device: of for of in foresee(run)}
    here = foreseen[HERE]
    yield "parameters", f"{here.parameters:,}, of which {here.trained:,} are trained privately"
    for device, of in foreseen.items():
        yield f"on {device}", f"predicted without classifiers: {_times(of.seconds)}; {of.memory / 1e6:,.0f} MB"
    if here.step < _MEASURED and run.recipe.performance.device == "cpu":
        cost = estimate(run)
        yield "time (estimate)", f"measured on a few steps: {_times(cost.seconds)}"
        yield "memory (estimate)", f"about {cost.memory / 1e6:,.0f} MB"


_MEASURED = 10.0  # seconds of a private step that are worth waiting for, some of them


def _times(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value)
    return f"about {duration(sum(seconds.values()))}: {parts}"


def _noise(plan: Plan) -> str:
    """The multiplier, and the larger one that Renyi accounting would ask for, as publications give it."""
    if plan.target_epsilon is None or not plan.is_private or plan.neighboring == "replace":
        return f"{plan.noise_multiplier:g}"
    renyi = rdp_noise_multiplier(plan.mechanism(plan.steps, 1.0), plan.target_epsilon, plan.target_delta)
    return f"{plan.noise_multiplier:g}, by privacy loss distributions (Renyi accounting would ask for {renyi:.4g})"


def _figure(epsilon: float) -> str:
    """Four digits, rounded up; without noise there is none."""
    return "inf (NOT PRIVATE)" if math.isinf(epsilon) else f"{rounded_up(epsilon, 4):g}"
