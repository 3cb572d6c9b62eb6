"""The classifier that is trained on images and read on others: the yardstick for synthetic images, and the private
baseline beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.data.augment import Augment
from dpfast.data.images import ImageSet, batch_indices, to_signed
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError, DataError
from dpfast.evaluation.networks import Classifier, Network, NormKind, build_network, normed_widths
from dpfast.progress import Progress, silent
from dpfast.seeding import seeded

Optimizer = Literal["adamw", "sgd"]

# Values (pixels times channels) of the images that are read at a time: 341 of CIFAR-10, each of whose activations in
# WRN-40-4 takes 90 MB then.
_CHUNK_PIXELS = 2**20
_READ = 2048  # images of a subset that are copied at a time


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """Network and training of the classifier.

    network: "small-cnn" (``widths``: channels of its two stages), "wrn-40-4" (the paper's), "wrn-16-1", "wrn-16-4"
    or "resnet-18". norm: "group" (of ``groups`` groups) mixes no rows, so that the network can be trained privately;
    "batch" is for ordinary training.
    optimizer: "adamw", or "sgd" with Nesterov's ``momentum``; either with the one-cycle schedule, whose peak is
    ``learning_rate``.
    augment: random mirroring and cropping at every step; usual on CIFAR-10 is ``Augment(flip=True, shift=4, fill=-1)``.
    warp: half-width of random rotation (radians), shear, stretch and shift (both in units of the image's half side) at
    every step, so that it reads digits drawn a little otherwise than those it saw. pixel_noise: standard deviation of
    noise on pixels of -1..1, at every step.
    """

    network: Network = "small-cnn"
    widths: tuple[int, int] = (24, 48)
    norm: NormKind = "group"
    groups: int = 8
    steps: int = 600
    batch_size: int = 128
    optimizer: Optimizer = "adamw"
    learning_rate: float = 4e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    augment: Augment = field(default_factory=Augment)
    warp: float = 0.12
    pixel_noise: float = 0.1

    def __post_init__(self) -> None:
        for name, kind in (("network", Network), ("norm", NormKind), ("optimizer", Optimizer)):
            if getattr(self, name) not in get_args(kind):
                one_of = ", ".join(get_args(kind))
                raise ConfigError(f"classifier {name}={getattr(self, name)!r}: expected one of {one_of}")
        normed = normed_widths(self.network, self.widths)
        if self.norm == "group" and any(width % self.groups for width in normed):
            raise ConfigError(f"{self.network}'s widths {normed} must be multiples of groups={self.groups}")


def build_classifier(dataset: ImageSet, spec: ClassifierSpec, *, seed: int) -> Classifier:
    """An untrained network for the data set's shape and classes; the global generator is left as it was."""
    with seeded(seed):
        return build_network(
            spec.network,
            dataset.image_shape[0],
            dataset.num_classes,
            widths=spec.widths,
            norm=spec.norm,
            groups=spec.groups,
        )


def train_classifier(
    dataset: ImageSet,
    *,
    spec: ClassifierSpec | None = None,
    seed: int,
    subset: Tensor | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Classifier:
    """Train on ``dataset`` (not private) for a fixed number of steps, with nothing chosen on other data.

    subset: int64, the numbers of the images to train on; all by default. Images are read batch by batch, so they may
    lie in a memory-mapped file. The trained network stays on ``device``; initial weights, batches and augmentations
    are the same on every device.
    """
    chosen = torch.arange(len(dataset)) if subset is None else subset
    if not len(chosen):
        raise DataError("the classifier needs at least one image to train on, got an empty set")
    spec = spec or ClassifierSpec()
    model = build_classifier(dataset, spec, seed=seed).train().to(device)
    optimizer, schedule = _optimizer(model, spec)
    generator = torch.Generator().manual_seed(seed)
    for step in range(spec.steps):
        ids = chosen[batch_indices(len(chosen), spec.batch_size, step, seed=seed)]
        images = to_signed(dataset.images[ids].to(device))
        images = spec.augment(images, RowKeys(seed, ids.to(device), step))
        logits = model(_disturb(images, spec, generator))
        loss = F.cross_entropy(logits, dataset.labels[ids].to(device), label_smoothing=spec.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, spec.steps, "training a classifier")
    return model.eval()


def _optimizer(
    model: nn.Module, spec: ClassifierSpec
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            nesterov=spec.momentum > 0,
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    # The schedule moves AdamW's first beta along, as torch does by default; SGD keeps the momentum that was asked for.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=spec.learning_rate, total_steps=spec.steps, cycle_momentum=spec.optimizer == "adamw"
    )
    return optimizer, schedule


def _disturb(images: Tensor, spec: ClassifierSpec, generator: torch.Generator) -> Tensor:
    """A random affine map near the identity for each image, and pixel noise, both drawn on the CPU."""
    if spec.warp:
        jitter = torch.empty(len(images), 2, 3).uniform_(-spec.warp, spec.warp, generator=generator)
        grid = F.affine_grid(torch.eye(2, 3) + jitter, list(images.shape), align_corners=False)
        # Around the image lies background: -1, which is 0 once shifted by 1.
        images = F.grid_sample(images + 1.0, grid.to(images.device), align_corners=False) - 1.0
    if spec.pixel_noise:
        images = images + spec.pixel_noise * torch.randn(images.shape, generator=generator).to(images.device)
    return images


def predict_classes(model: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Most likely class of each uint8 image, int64 ``[n]`` on the CPU."""
    return _of_logits(lambda logits: logits.argmax(1), model, images, batch_size)


def predict_probabilities(model: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Softmax of the logits of uint8 images ``[n, C, H, W]``: float32 ``[n, classes]`` on the CPU."""
    return _of_logits(lambda logits: logits.softmax(1), model, images, batch_size)


@torch.no_grad()
def _of_logits(read: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, batch_size: int | None) -> Tensor:
    """What ``read`` makes of the logits of all images, chunk by chunk; the model is in eval mode meanwhile."""
    batch_size = batch_size or min(2000, max(1, _CHUNK_PIXELS // images.shape[1:].numel()))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    shape_of = read(model(to_signed(images[:0].to(device))))
    # All of it at once: small results kept one by one between large chunks fragment the heap.
    results = torch.empty(len(images), *shape_of.shape[1:], dtype=shape_of.dtype)
    for part, chunk in zip(results.split(batch_size), images.split(batch_size), strict=True):
        part.copy_(read(model(to_signed(chunk.to(device)))))
    model.train(was_training)
    return results


def accuracy(model: nn.Module, dataset: ImageSet, *, subset: Tensor | None = None) -> float:
    """Share of ``dataset``, or of its images ``subset`` (int64), that the model labels correctly, 0 to 1."""
    chosen = torch.arange(len(dataset)) if subset is None else subset
    if not len(chosen):
        raise DataError("accuracy needs at least one image, got an empty set")
    parts = chosen.split(_READ) if subset is not None else (slice(None),)
    right = [(predict_classes(model, dataset.images[ids]) == dataset.labels[ids]).sum() for ids in parts]
    return int(sum(right)) / len(chosen)


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """An ``Objective``, ``(model, images, labels, keys) -> losses [B * K]``: cross-entropy of shifted images."""

    augment: Augment = field(default_factory=lambda: Augment(shift=1, fill=-1.0))

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, keys: RowKeys) -> Tensor:
        rows = self.augment(to_signed(images), keys)
        return F.cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")
