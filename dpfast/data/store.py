"""A data set on disk as training reads it: memory-mapped, so that it may be larger than memory.

store/store.json          name, classes, shape, checksums, and what it was made from
store/train/images.npy    uint8 [n, C, H, W]
store/train/labels.npy    int64 [n]
store/test/...
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpfast.data.images import ImageSet
from dpfast.data.mapped import map_file
from dpfast.errors import DataError, FileError
from dpfast.files import read_json

FORMAT = "dpfast-store-1"
MANIFEST = "store.json"
_CURE = "remove the folder and prepare the store again (dpfast data prepare)"


@dataclass(frozen=True)
class StoredFile:
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredSplit:
    """The number of images of a split, and its two files."""

    count: int
    images: StoredFile
    labels: StoredFile


@dataclass(frozen=True)
class Store:
    """What ``store.json`` says; equal data sets prepared alike have equal ones.

    partial: it may be a part of what is published under this name: sizes and checksums were not compared. resizing:
    what was done to images of another size, "" for nothing. shape: (C, H, W) of each image. source: of each file that
    was read its name in the source folder, bytes and sha256.
    """

    name: str
    partial: bool
    resizing: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    splits: dict[str, StoredSplit]
    source: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The value of ``store.json``."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, eq=False)
class StoredImages(ImageSet):
    """One split of a store, memory-mapped. Written to, its tensors change in this process and nothing on disk does."""

    store: Store


def read_store(folder: str | Path) -> Store:
    """What the store in ``folder`` holds. Raises FileError if there is none, or one of another version."""
    folder = Path(folder)
    value = read_json(folder / MANIFEST, cure=f"give the folder of a store, or {_CURE}")
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise FileError(f"{folder / MANIFEST}: expected a store of format {FORMAT!r}; {_CURE}")
    try:
        splits = {name: _split(split) for name, split in value.pop("splits").items()}
        classes, shape = tuple(value.pop("classes")), tuple(map(int, value.pop("shape")))
        return Store(**value, splits=splits, classes=classes, shape=shape)  # type: ignore[arg-type]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FileError(f"{folder / MANIFEST} is damaged ({error}); {_CURE}") from error


def open_store(folder: str | Path, split: str, *, name: str | None = None, verify: bool = False) -> StoredImages:
    """The images of a split, read from disk where they are used.

    name: the data set that is expected. verify: compare the checksums, which reads everything once.

    Raises:
        DataError: the store is of another data set, has no such split, or holds labels out of range.
        FileError: there is no store, or one of its files has another size, shape or checksum than was written.
    """
    folder = Path(folder)
    store = read_store(folder)
    if name is not None and store.name != name:
        raise DataError(
            f"{folder} holds {store.name!r}, expected {name!r}; give the folder of that store, or prepare it"
        )
    if split not in store.splits:
        raise DataError(f"{folder} has the splits {', '.join(store.splits)}, expected {split!r}; choose one of them")
    stored = store.splits[split]
    images = _mapped(folder / split / "images.npy", stored.images, np.dtype("u1"), (stored.count, *store.shape))
    labels = _mapped(folder / split / "labels.npy", stored.labels, np.dtype("<i8"), (stored.count,))
    if verify:
        verify_split(folder, split, stored)
    try:
        return StoredImages(torch.from_numpy(images), torch.from_numpy(labels), store.classes, store)
    except DataError as error:
        raise DataError(f"{folder / split}: {error}\n{_CURE}") from error


def verify_split(folder: Path, split: str, stored: StoredSplit) -> None:
    """Raises FileError that names each file of the split whose contents are not what was written."""
    wrong = []
    for name, file in (("images.npy", stored.images), ("labels.npy", stored.labels)):
        with open(folder / split / name, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != file.sha256:
            wrong.append(f"{folder / split / name}: expected sha256 {file.sha256}, got {found}")
    if wrong:
        raise FileError("\n".join([*wrong, f"the store is damaged; {_CURE}"]))


def _split(value: dict[str, Any]) -> StoredSplit:
    files = (StoredFile(bytes=int(of["bytes"]), sha256=str(of["sha256"])) for of in (value["images"], value["labels"]))
    return StoredSplit(int(value["count"]), *files)


def _mapped(path: Path, stored: StoredFile, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The array of a file that is as long as its shape asks for: one that is shorter would kill who reads it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = _header(file)
            start = file.tell()
            memory = map_file(file)
    except Exception as error:  # numpy reads a header as a piece of Python, and raises what Python does
        raise FileError(f"{path} cannot be read ({error}); {_CURE}") from error
    expected = (shape, False, dtype)
    if header != expected or size != stored.bytes or size != start + math.prod(shape) * dtype.itemsize:
        raise FileError(
            f"{path}: expected {dtype} {shape} in {stored.bytes:,} bytes, got {header[2]} {header[0]} in {size:,}; "
            f"{_CURE}"
        )
    return np.ndarray(shape, dtype, memory, start)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not of the npy version 1.0")
    return np.lib.format.read_array_header_1_0(file)
