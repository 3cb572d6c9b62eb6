"""A folder of images per class, as torchvision's ImageFolder has them, with a folder around them per split or without.

    train/cat/1.png   train/dog/x/2.jpg   test/cat/3.png         or        cat/1.png   dog/x/2.jpg

A class is a folder; its number is its place among their sorted names. Files that are no images by their suffix are left
out, as torchvision does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dpfast.data.formats.reading import Chunk, Reading, Split
from dpfast.data.formats.source import Format, Source
from dpfast.data.formats.splits import split_name
from dpfast.data.pictures import SUFFIXES, decode, peek
from dpfast.errors import DataError, FileError

_CHUNK = 64  # images of any size


@dataclass(frozen=True)
class _Images:
    """Of one split: its folder, the names of its files below it, and their labels int64 ``[n]``."""

    root: Path
    names: list[str]
    labels: np.ndarray


def _read(source: Source) -> Reading:
    if not source.path.is_dir():
        raise source.missing("a folder per class with images in it")
    roots = _splits(source.path)
    classes = _classes(roots)
    found = {split: _images(root, classes) for split, root in roots.items()}
    channels = _check_headers(found, sized=source.size is not None)
    splits = {
        split: Split(len(images.names), partial(_chunks, source, split, images, channels))
        for split, images in found.items()
    }
    return Reading(classes, splits)


def _splits(path: Path) -> dict[str, Path]:
    """The folder of each split. Raises DataError if some folders are splits and others are not, or two are the same."""
    folders = _folders(path)
    splits = {split: path / name for name in folders if (split := split_name(name))}
    if splits and len(splits) < len(folders):
        raise DataError(
            f"{path}: expected a folder for each split or for each class, got {', '.join(folders)}; rename or "
            "move those that are not what the others are"
        )
    return splits or {"train": path}


def _classes(roots: dict[str, Path]) -> tuple[str, ...]:
    """Raises DataError if there are none, or not the same in all splits."""
    named = {root: _folders(root) for root in roots.values()}
    every = sorted(set().union(*named.values()))
    lacking = [
        f"  - {root} lacks {', '.join(sorted(set(every) - set(names)))}"
        for root, names in named.items()
        if names != every
    ]
    if lacking:
        raise DataError(
            "expected the same class folders in each split:\n" + "\n".join(lacking) + "\ncomplete or remove them"
        )
    if not every:
        raise DataError(f"{next(iter(roots.values()))}: expected a folder per class with images in it, found no folder")
    return tuple(every)


def _images(root: Path, classes: tuple[str, ...]) -> _Images:
    """Raises DataError that names every class without images."""
    files = [_files(root, name) for name in classes]
    empty = [name for name, names in zip(classes, files, strict=True) if not names]
    if empty:
        raise DataError(
            f"{root}: expected images ({', '.join(SUFFIXES)}) of each class, got none of {', '.join(empty)}; add "
            "them, or remove these folders from all splits"
        )
    labels = np.repeat(np.arange(len(classes)), [len(names) for names in files])
    return _Images(root, [name for names in files for name in names], labels)


def _check_headers(found: dict[str, _Images], *, sized: bool) -> int:
    """The channels of all images: 1 if all are grey, else 3. Raises one error for all that cannot be used."""
    channels, problems = 1, []
    shapes: dict[tuple[int, int], Path] = {}
    for images in found.values():
        for name in images.names:
            path = images.root / name
            try:
                with open(path, "rb") as file:
                    of_image, shape = peek(file, str(path))
            except (OSError, FileError) as error:
                problems.append(f"  - {error}")
                continue
            channels = max(channels, of_image)
            shapes.setdefault(shape, path)
    if len(shapes) > 1 and not sized:
        several = "; ".join(f"{height}x{width} ({path})" for (height, width), path in list(shapes.items())[:3])
        problems.append(f"  - images are of {len(shapes)} sizes: {several}; choose one (size=32, --size 32)")
    if problems:
        more = [f"  - and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError("these images cannot be used:\n" + "\n".join(problems[:20] + more))
    return channels


def _chunks(source: Source, split: str, images: _Images, channels: int) -> Iterator[Chunk]:
    for start in range(0, len(images.names), _CHUNK):
        names = images.names[start : start + _CHUNK]
        contents = [(name, source.image(images.root, name, folder=split)) for name in names]
        pixels = [decode(c, str(images.root / name), channels=channels, size=source.size) for name, c in contents]
        yield np.stack(pixels), images.labels[start : start + _CHUNK]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, name: str) -> list[str]:
    """Names below ``root`` of the images of a class, however deep, in torchvision's order."""
    walk = sorted(os.walk(root / name, followlinks=True))
    paths = [Path(folder, file) for folder, _, files in walk for file in sorted(files)]
    return [path.relative_to(root).as_posix() for path in paths if path.suffix.lower() in SUFFIXES]


IMAGE_FOLDER = Format(_read)
