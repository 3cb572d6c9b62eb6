"""What a run will cost, from a few timed steps on random images: no private image is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping import GhostClipper
from dpfast.data import ImageSet
from dpfast.data.keyed import RowKeys
from dpfast.diffusion.sampler import generate
from dpfast.evaluation import train_classifier
from dpfast.runs import build
from dpfast.runs.pipeline import Run

_PRIVATE_ROWS = 256  # rows in the physical batch that is timed


@dataclass(frozen=True)
class Estimate:
    """image_passes: by stage, forward and backward (sampling: forward only). seconds: by stage. memory: bytes of
    weights, optimizer and activations at the largest batch.
    """

    image_passes: dict[str, int]
    seconds: dict[str, float]
    memory: int


def estimate(run: Run) -> Estimate:
    """Measured on this machine; expect half to twice of it."""
    recipe = run.recipe
    device = recipe.performance.device
    model = build.unet(recipe, run.private).to(device)
    public_rows = recipe.pretrain.batch_size
    private_rows = min(_PRIVATE_ROWS, round(run.plan.expected_batch_size) * recipe.private.augmult)
    rows = {
        "pretrain": recipe.pretrain.steps * public_rows,
        "train": round(recipe.private.steps * run.plan.expected_batch_size) * recipe.private.augmult,
        "sample": 2 * recipe.sample.count * recipe.sample.steps * (1 if recipe.sample.guidance == 1 else 2),
    }
    classifiers = 3 * recipe.evaluate.seeds * recipe.evaluate.steps + recipe.evaluate.extractor_steps
    per_row = {
        "pretrain": _timed(_public_step(run, model, public_rows)) / public_rows,
        "train": _timed(_private_step(run, model, private_rows)) / private_rows,
        "sample": _sampling_time(run, model),
    }
    seconds = {name: rows[name] * per_row[name] for name in rows}
    seconds["evaluate"] = classifiers * _classifier_time(run)
    return Estimate(rows, seconds, _memory(run, model, max(public_rows, private_rows)))


def _random_images(run: Run, count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *run.private.image_shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % run.private.num_classes
    return ImageSet(images, labels, run.private.classes)


def _loss(run: Run, model: nn.Module, examples: int, augmult: int) -> Tensor:
    device = run.recipe.performance.device
    batch = _random_images(run, examples)
    keys = RowKeys(0, torch.arange(examples, device=device), 0, augmult)
    objective = build.private_objective(run.recipe, run.private)
    return objective(model, batch.images.to(device), batch.labels.to(device), keys)


def _public_step(run: Run, model: nn.Module, rows: int) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        _loss(run, model, rows, 1).mean().backward()

    return step


def _private_step(run: Run, model: nn.Module, rows: int) -> Callable[[], None]:
    augmult = run.recipe.private.augmult
    clipper = GhostClipper(
        model,
        max_grad_norm=run.recipe.private.max_grad_norm,
        augmult=augmult,
        performance=build.performance(run.recipe),
    )

    def step() -> None:
        clipper.zero_grad()
        with clipper:
            clipper.backward(_loss(run, model, max(1, rows // augmult), augmult))

    return step


def _sampling_time(run: Run, model: nn.Module) -> float:
    """Seconds for one image and one step of the sampler."""
    count, steps = min(run.recipe.sample.batch_size, run.recipe.sample.count), 2

    def draw() -> None:
        generate(
            model,
            build.scheduler(run.recipe),
            _random_images(run, count).labels,
            image_shape=run.private.image_shape,
            num_classes=run.private.num_classes,
            steps=steps,
            batch_size=count,
        )

    return _timed(draw) / (count * steps)


def _classifier_time(run: Run) -> float:
    """Seconds for one step of an ordinary classifier."""
    from dataclasses import replace

    images = _random_images(run, run.recipe.evaluate.batch_size)
    spec = replace(build.classifier_spec(run.recipe), steps=4)
    return _timed(lambda: train_classifier(images, spec=spec, seed=0)) / 4


def _timed(step: Callable[[], Any]) -> float:
    """The faster of two calls, after one to warm up."""
    step()
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _memory(run: Run, model: nn.Module, rows: int) -> int:
    """Weights, gradients, clipped sums, Adam's two moments and the average, and what one forward pass saves."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(_loss(run, model, rows, 1))
    return 6 * parameters + sum(saved.values())
