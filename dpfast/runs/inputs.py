"""The images that a recipe names, and what tells them from others of the same name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dpfast.data import ImageSet, font_digits, real_digits
from dpfast.data.digits import DIGIT_CLASSES
from dpfast.data.formats import PUBLISHED
from dpfast.data.store import MANIFEST, open_store, read_store, verify_split
from dpfast.errors import ConfigError, DataError
from dpfast.recipes.schema import Recipe
from dpfast.runs.seeds import seed_for

ZEROS = "zeros:"  # before the name of a published data set: images of zeros in its place, to plan with
_USES = {"train": "which is trained on", "test": "on which accuracies are measured"}


def private_data(recipe: Recipe) -> ImageSet:
    """The images to protect."""
    return _images(recipe, "private", "train")


def test_data(recipe: Recipe) -> ImageSet:
    """The images that accuracies are measured on: the test split, or with ``data.fold`` that fold."""
    return _images(recipe, "private", "test")


def public_data(recipe: Recipe) -> ImageSet:
    """The images that the model is pre-trained on: all of a store, or a copy of ``data.public_count`` of them."""
    count = recipe.data.public_count
    if recipe.data.public == "fonts":
        size = private_data(recipe).image_shape[-1]
        return font_digits(count, seed=seed_for(recipe, "public data"), size=size)
    every = public_store(recipe)
    if not 0 < count < len(every):
        return every
    generator = torch.Generator().manual_seed(seed_for(recipe, "public data"))
    drawn = torch.randperm(len(every), generator=generator)[:count]  # the first might be of one class
    return every.select(drawn.sort().values)  # in the order that they have on disk


def public_store(recipe: Recipe) -> ImageSet:
    """All public images that there are, where they come from a store; none is read for it."""
    return _images(recipe, "public", "train")


def verify(recipe: Recipe) -> None:
    """Compare the stores of the recipe with their checksums, which reads them once; FileError where one is damaged."""
    for name in {recipe.data.private, recipe.data.public}:
        if _is_stored(name):
            folder = Path(recipe.data.folder) / name
            for split, stored in read_store(folder).splits.items():
                verify_split(folder, split, stored)


def public_classes(recipe: Recipe) -> tuple[str, ...]:
    """Of the public images; no font is rendered to know them."""
    return DIGIT_CLASSES if recipe.data.public == "fonts" else public_store(recipe).classes


def shares_labels(recipe: Recipe) -> bool:
    """Whether public and private images have the same classes."""
    return public_classes(recipe) == private_data(recipe).classes


def shares_images(recipe: Recipe) -> bool:
    """Whether the public store holds a split of the private one, under whatever name."""
    data = recipe.data
    if not (_is_stored(data.public) and _is_stored(data.private)):
        return False
    public, private = (read_store(Path(data.folder) / name).splits.values() for name in (data.public, data.private))
    return bool({split.images.sha256 for split in public} & {split.images.sha256 for split in private})


def public_identity(recipe: Recipe) -> dict[str, Any]:
    """What tells the public images from others of the same name."""
    if not _is_stored(recipe.data.public):
        return {}
    store = read_store(Path(recipe.data.folder) / recipe.data.public)
    images = {name: split.images.sha256 for name, split in store.splits.items()}
    return {"public images": images, "public classes": list(store.classes)}


def _is_stored(name: str) -> bool:
    return name not in ("digits", "fonts") and not name.startswith(ZEROS)


def _images(recipe: Recipe, key: str, split: Literal["train", "test"]) -> ImageSet:
    data, name = recipe.data, str(getattr(recipe.data, key))
    if name == "digits":
        return real_digits(split, fold=data.fold)
    if name.startswith(ZEROS):
        return _as_published(name.removeprefix(ZEROS), split)
    folder = Path(data.folder) / name
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"recipe key data.{key} = {name!r}: no store in {folder}. Prepare it from the files of the data set"
            f" (dpfast data prepare {name} --source ...), or say where stores are (--set data.folder=...)"
        )
    if data.fold is not None:
        raise ConfigError("recipe key data.fold: only digits have folds; leave it out")
    splits = read_store(folder).splits
    if split not in splits:
        raise DataError(
            f"{folder}: no split {split!r}, {_USES[split]}, only {', '.join(splits)}; add one to the source ({split}/"
            f" as a folder, {split}_images and {split}_labels as arrays), remove the store and prepare it again"
        )
    return open_store(folder, split, name=name)


def planned(recipe: Recipe) -> Recipe:
    """The same with images of zeros, as many as are published, in the place of each published data set not there."""
    data = recipe.data

    def present(name: str) -> str:
        missing = name in PUBLISHED and not (Path(data.folder) / name / MANIFEST).exists()
        return ZEROS + name if missing else name

    return replace(recipe, data=replace(data, private=present(data.private), public=present(data.public)))


def is_planned(recipe: Recipe) -> bool:
    """Whether images of zeros stand in the place of some."""
    return any(name.startswith(ZEROS) for name in (recipe.data.private, recipe.data.public))


@dataclass(frozen=True, eq=False)
class _Zeros(ImageSet):
    """Images of zeros, which share the memory of one number; equal ones are told by their shape and classes."""

    def fingerprint(self) -> str:
        return f"zeros {tuple(self.images.shape)}, {self.num_classes} classes"


def _as_published(name: str, split: str) -> ImageSet:
    published = PUBLISHED[name].published if name in PUBLISHED else None
    if published is None:
        raise ConfigError(f"{ZEROS}{name}: nothing is published of {name!r}; name one of {', '.join(PUBLISHED)}")
    count, classes = published.sizes[split], published.classes
    images = torch.zeros(1, dtype=torch.uint8).expand(count, *published.shape)
    return _Zeros(images, torch.arange(count) % classes, tuple(map(str, range(classes))))
