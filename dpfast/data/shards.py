"""Labeled images in a folder, shard by shard: a shard is there whole or not at all, and is made once."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dpfast.data.images import ImageSet
from dpfast.data.mapped import on_disk
from dpfast.errors import DataError
from dpfast.files import read_json, write_atomic

MANIFEST = "manifest.json"


class ShardFolder:
    """Files ``shard-00000.npz`` (``images`` uint8 ``[n, C, H, W]``, ``labels`` int64 ``[n]``) and a manifest.

    settings: all that the images depend on, JSON values; three of them lay out the folder: ``count`` images in
    files of ``shard_size``, their labels running through ``classes``.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.classes: tuple[str, ...] = tuple(settings["classes"])

    @classmethod
    def claim(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """The folder for these settings, new or begun earlier. Raises DataError if it was made with others."""
        settings = claim(folder, settings)
        return cls(folder, settings)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(number, labels) of each shard."""
        return iter(enumerate(self.labels.split(self.settings["shard_size"])))

    @property
    def labels(self) -> Tensor:
        """Of all shards, int64 ``[count]``."""
        return torch.arange(self.settings["count"]) % len(self.classes)

    def read(self, number: int, labels: Tensor) -> Tensor | None:
        """The images of a shard that is there, readable and holds these labels; None otherwise."""
        try:
            # From memory: numpy leaves the file open when it is torn.
            with np.load(io.BytesIO(self._path(number).read_bytes()), allow_pickle=False) as shard:
                images, found = torch.from_numpy(shard["images"]), shard["labels"]
        except Exception:  # a torn or foreign file raises anything from OSError to zlib.error: made again all the same
            return None
        return images if len(images) == len(labels) and np.array_equal(found, labels.numpy()) else None

    def write(self, number: int, images: Tensor, labels: Tensor) -> None:
        """Write one shard, whole or not at all."""
        file = io.BytesIO()
        np.savez(file, images=images.numpy(), labels=labels.numpy())
        write_atomic(self._path(number), file.getbuffer())

    def load(self) -> ImageSet:
        """Every image, unpacked on disk beside the shards (``on_disk``); raises DataError if some are missing."""
        shape = (len(self.labels), *self.settings["image_shape"])
        blocks = (self.images(number, labels) for number, labels in self)
        return ImageSet(on_disk(blocks, shape, torch.uint8, self.folder), self.labels, self.classes)

    def first(self, count: int) -> ImageSet:
        """The first ``count`` images of each class, class by class; reads only the shards that hold them."""
        heads = self.heads(count)
        labels = torch.arange(len(heads)).repeat_interleave(torch.tensor([len(images) for images in heads]))
        return ImageSet(torch.cat(heads), labels, self.classes)

    def heads(self, count: int) -> list[Tensor]:
        """The first ``count`` images of each class, from as few shards as hold them; DataError if one is missing."""
        found: list[list[Tensor]] = [[] for _ in self.classes]
        for number, labels in self:
            if all(sum(map(len, images)) >= count for images in found):
                break
            images = self.images(number, labels)
            for label, of_class in enumerate(found):
                of_class.append(images[labels == label][:count])
        return [torch.cat(images)[:count] for images in found]

    def images(self, number: int, labels: Tensor) -> Tensor:
        """Of a shard, uint8 ``[n, C, H, W]``; raises DataError if it is missing or damaged."""
        images = self.read(number, labels)
        if images is None:
            raise DataError(
                f"{self._path(number)} is missing or damaged; run the same sampling again to complete the folder"
            )
        return images

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npz"


def claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Note in the folder what its samples are made with (the value is what JSON gives back); DataError for others."""
    settings = json.loads(json.dumps(settings, default=str))
    manifest = folder / MANIFEST
    if not manifest.exists():
        write_atomic(manifest, json.dumps(settings, indent=1) + "\n")
    found = _manifest(folder)
    if found != settings:
        differing = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
        raise DataError(
            f"{folder} holds samples made with other settings ({', '.join(differing)}); "
            "choose another folder, or remove this one to make them anew"
        )
    return settings


def open_shards(folder: str | Path) -> ShardFolder:
    """A folder that was made before; raises DataError if it holds no manifest."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        below = [folder / name for name in ("samples", "release/samples") if (folder / name / MANIFEST).exists()]
        cure = f"give {below[0]}" if below else "make samples with generate_shards or a run first"
        raise DataError(f"{folder} holds no {MANIFEST}; {cure}")
    return ShardFolder(folder, _manifest(folder))


def load_shards(folder: str | Path) -> ImageSet:
    """All images of a complete folder; raises DataError if it holds none, or not all."""
    return open_shards(folder).load()


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(folder / MANIFEST, cure="remove the folder to make the samples anew")
    return manifest
