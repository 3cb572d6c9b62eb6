"""A small convolutional classifier: the yardstick for synthetic images, and the private baseline beside them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.data.augment import Augment
from dpfast.data.images import ImageSet, batch_indices, to_signed
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError, DataError
from dpfast.progress import Progress, silent
from dpfast.seeding import seeded


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """Network and training of the classifier.

    widths: channels of the two convolutional stages; the network has GroupNorm only, so that it mixes no rows and
    can be trained privately. warp: half-width of random rotation (radians), shear, stretch and shift (both in units
    of the image's half side) at every step, so that it reads digits drawn a little otherwise than those it saw.
    """

    widths: tuple[int, int] = (24, 48)
    groups: int = 8
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warp: float = 0.12
    pixel_noise: float = 0.1

    def __post_init__(self) -> None:
        if any(width % self.groups for width in self.widths):
            raise ConfigError(f"classifier widths {self.widths} must be multiples of groups={self.groups}")


class SmallCNN(nn.Module):
    """uint8 or -1..1 float ``[n, C, H, W]`` -> logits ``[n, classes]``; ``features`` gives the penultimate layer.

    Two convolutions, pooling, two convolutions, pooling to 2x2, one linear layer; 39k parameters as it stands.
    """

    def __init__(self, channels: int, num_classes: int, spec: ClassifierSpec) -> None:
        super().__init__()
        first, second = spec.widths
        self.body = nn.Sequential(
            *_block(channels, first, spec.groups),
            *_block(first, first, spec.groups),
            nn.MaxPool2d(2),
            *_block(first, second, spec.groups),
            *_block(second, second, spec.groups),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.num_features = 4 * second
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer, ``[n, num_features]``."""
        values: Tensor = self.body(to_signed(images) if images.dtype == torch.uint8 else images)
        return values

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(channels: int, width: int, groups: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(groups, width), nn.SiLU()]


def build_classifier(dataset: ImageSet, spec: ClassifierSpec, *, seed: int) -> SmallCNN:
    """An untrained network for the data set's shape and classes; the global generator is left as it was."""
    with seeded(seed):
        return SmallCNN(dataset.image_shape[0], dataset.num_classes, spec)


def train_classifier(
    dataset: ImageSet, *, spec: ClassifierSpec | None = None, seed: int, progress: Progress = silent
) -> SmallCNN:
    """Train on ``dataset`` (not private) for a fixed number of steps, with nothing chosen on other data."""
    if not len(dataset):
        raise DataError("the classifier needs at least one image to train on, got an empty set")
    spec = spec or ClassifierSpec()
    model = build_classifier(dataset, spec, seed=seed).train()
    images = to_signed(dataset.images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=spec.learning_rate, total_steps=spec.steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(spec.steps):
        ids = batch_indices(len(dataset), spec.batch_size, step, seed=seed)
        logits = model(_disturb(images[ids], spec, generator))
        loss = F.cross_entropy(logits, dataset.labels[ids], label_smoothing=spec.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, spec.steps, "training a classifier")
    return model.eval()


def _disturb(images: Tensor, spec: ClassifierSpec, generator: torch.Generator) -> Tensor:
    """A random affine map near the identity for each image, and pixel noise."""
    jitter = torch.empty(len(images), 2, 3).uniform_(-spec.warp, spec.warp, generator=generator)
    grid = F.affine_grid(torch.eye(2, 3) + jitter, list(images.shape), align_corners=False)
    # Around the image lies background: -1, which is 0 once shifted by 1.
    warped = F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0
    return warped + spec.pixel_noise * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def predict_classes(model: nn.Module, images: Tensor, *, batch_size: int = 2000) -> Tensor:
    """Most likely class of each uint8 image, int64 ``[n]``."""
    was_training = model.training
    model.eval()
    classes = [model(to_signed(chunk)).argmax(1) for chunk in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64)


def accuracy(model: nn.Module, dataset: ImageSet) -> float:
    """Share of ``dataset`` that the model labels correctly, 0 to 1."""
    if not len(dataset):
        raise DataError("accuracy needs at least one image, got an empty set")
    return float((predict_classes(model, dataset.images) == dataset.labels).double().mean())


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """An ``Objective``, ``(model, images, labels, keys) -> losses [B * K]``: cross-entropy of shifted images."""

    augment: Augment = field(default_factory=lambda: Augment(shift=1, fill=-1.0))

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, keys: RowKeys) -> Tensor:
        rows = self.augment(to_signed(images), keys)
        return F.cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")
