"""Labeled images in memory: the one form in which data enters training, sampling and evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 ``[n, C, H, W]`` in 0..255, labels int64 ``[n]`` in 0..len(classes)-1, class names.

    Raises DataError that lists everything wrong with the shapes, dtypes and labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = _problems(self.images, self.labels, self.classes)
        if problems:
            raise DataError("not a valid image set:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each of them occurs."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, indices: Tensor | Sequence[int]) -> "ImageSet":
        """The examples at ``indices``, in that order, as a copy."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def fingerprint(self) -> str:
        """sha256 over shape, pixels, labels and class names: equal sets have equal fingerprints."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _problems(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> list[str]:
    problems = []
    if images.dtype != torch.uint8:
        problems.append(f"images must be uint8 in 0..255, got {images.dtype}; scale and convert with .to(torch.uint8)")
    if images.ndim != 4:
        problems.append(f"images must be [n, C, H, W], got shape {tuple(images.shape)}; add the missing axis")
    if labels.dtype != torch.int64:
        problems.append(f"labels must be int64, got {labels.dtype}; convert with .long()")
    if labels.ndim != 1 or (images.ndim > 0 and labels.shape[0] != images.shape[0]):
        problems.append(
            f"labels must be [n], one per image, got {tuple(labels.shape)} for images {tuple(images.shape)}"
        )
    if not classes:
        problems.append("classes is empty; name at least one class")
    elif labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < len(classes)):
        span = f"{int(labels.min())}..{int(labels.max())}"
        problems.append(f"labels must lie in 0..{len(classes) - 1} ({len(classes)} classes), got {span}")
    return problems


def to_signed(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float -1..1 (clamped) -> uint8 0..255, rounded to nearest."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def batch_indices(size: int, batch_size: int, step: int, *, seed: int) -> Tensor:
    """int64 ``[batch_size]``: batch ``step`` of an endless sequence of shuffled passes, without any state."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // size
    batch = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batch[epochs == epoch] = order[positions[epochs == epoch] % size]
    return batch
