"""MNIST and Fashion-MNIST: idx files, plain or gzipped, under the names that they are published with.

An idx file is big-endian: a magic number (0x0801 for one dimension of bytes, 0x0803 for three), the dimensions, the
bytes. Both data sets have the same names and sizes; only the checksums tell one from the other.
"""

import gzip
import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np

from dpfast.data.formats.reading import CHUNK, Chunk, Published, Reading, Split, checked_labels, readable
from dpfast.data.formats.source import Format, Source
from dpfast.errors import DataError

_STEMS = {"train": "train", "test": "t10k"}
_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
_SIDE = 28


def _read(classes: tuple[str, ...], folder: str, source: Source) -> Reading:
    """folder: what torchvision calls it, which has the files in ``raw``."""
    names = [f"{stem}-{kind}" for stem in _STEMS.values() for kind in _KINDS]
    roots = [source.path, source.path / "raw", source.path / folder / "raw"]
    root = next((root for root in roots if any(_file(root, name) for name in names)), None)
    if root is None:
        raise source.missing(f"{', '.join(names)} (each plain or .gz)")
    files = {name: file for name in names if (file := _file(root, name))}
    pairs = {split: [files[n] for kind in _KINDS if (n := f"{stem}-{kind}") in files] for split, stem in _STEMS.items()}
    if any(len(pair) == 1 or (not pair and not source.partial) for pair in pairs.values()):
        raise source.missing(f"{', '.join(name for name in names if name not in files)} in {root}")
    source.add(root, [file.name for file in files.values()])
    return Reading(classes, {split: _split(*pair, classes=len(classes)) for split, pair in pairs.items() if pair})


def _split(images: Path, labels: Path, *, classes: int) -> Split:
    with _opened(labels) as file:
        (count,) = _header(file, labels, 1)
        numbers = checked_labels(_content(file, labels, (count,)), classes, str(labels))
        _end(file, labels)
    with _opened(images) as file:
        shape = _header(file, images, 3)
    if shape != (count, _SIDE, _SIDE):
        raise DataError(
            f"{images}: expected {count} images of {_SIDE}x{_SIDE} for the labels in {labels.name}, got {shape}; "
            "get both again"
        )
    return Split(count, partial(_chunks, images, numbers))


def _chunks(path: Path, labels: np.ndarray) -> Iterator[Chunk]:
    with _opened(path) as file:
        _header(file, path, 3)
        for start in range(0, len(labels), CHUNK):
            part = labels[start : start + CHUNK]
            yield _content(file, path, (len(part), 1, _SIDE, _SIDE)), part
        _end(file, path)


def _header(file: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    length = 4 + 4 * dimensions
    with readable(str(path)):
        head = file.read(length)
    magic = 0x0800 + dimensions
    if len(head) < length or int.from_bytes(head[:4], "big") != magic:
        got = head.hex(" ", -4) or "an empty file"
        raise DataError(f"{path}: expected a header with magic number {magic:08x}, got {got}; get the file again")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    size = length + math.prod(shape)
    if path.suffix != ".gz" and path.stat().st_size != size:
        raise DataError(f"{path}: expected {size:,} bytes for {shape}, got {path.stat().st_size:,}; get the file again")
    return shape


def _content(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with readable(str(path)):
        return np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)


def _end(file: IO[bytes], path: Path) -> None:
    with readable(str(path)):
        if file.read(1):
            raise DataError(f"{path}: holds more than its header says; get the file again")


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (or .gz)"
_SIZES = {"train": 60_000, "test": 10_000}

MNIST = Format(
    partial(_read, tuple("0123456789"), "MNIST"),
    Published(
        "MNIST",
        "http://yann.lecun.com/exdb/mnist/",
        _FILES,
        _SIZES,
        (1, 28, 28),
        10,
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
)
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST = Format(
    partial(_read, _CLOTHES, "FashionMNIST"),
    Published(
        "Fashion-MNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        _FILES,
        _SIZES,
        (1, 28, 28),
        10,
        terms="MIT licence",
        md5={
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
)
