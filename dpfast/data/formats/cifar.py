"""CIFAR-10 and CIFAR-100, the Python and the binary version: extracted, or in the archive as it is published.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. An image is 3072 bytes: 1024 red, 1024 green
and 1024 blue values, each 32 rows of 32 pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dpfast.data.formats.packages import Package, packages
from dpfast.data.formats.pickles import image_batch, unpickle
from dpfast.data.formats.reading import Chunk, Published, Reading, Split, checked_labels, in_chunks
from dpfast.data.formats.source import Format, Source
from dpfast.errors import DataError

_IMAGE = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """files: of each split. classes: the file of their names, by which a folder is recognised.

    labels: of the Python version the key of the labels, of the binary version the bytes before an image, whose last is
    its label. names: the key of the class names, of the Python version.
    """

    archive: str
    folder: str
    files: dict[str, tuple[str, ...]]
    classes: str
    labels: str | int
    names: str = ""


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10 = (
    _Version(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        files={"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        classes="batches.meta.txt",
        labels=1,
    ),
    _Version(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        files={"train": _BATCHES, "test": ("test_batch",)},
        classes="batches.meta",
        labels="labels",
        names="label_names",
    ),
)
_CIFAR100 = (
    _Version(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        classes="fine_label_names.txt",
        labels=2,  # the coarse one, then the fine one
    ),
    _Version(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        files={"train": ("train",), "test": ("test",)},
        classes="meta",
        labels="fine_labels",
        names="fine_label_names",
    ),
)
_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SIZES = {"train": 50_000, "test": 10_000}


def _read(versions: tuple[_Version, ...], number: int, source: Source) -> Reading:
    wanted = [name for version in versions for name in (version.folder, version.archive)]
    for package in packages(source.path, wanted):
        for version in versions:
            if version.classes in package:
                return _reading(package, version, number, source)
    raise source.missing(f"one of {', '.join(wanted)}")


def _reading(package: Package, version: _Version, number: int, source: Source) -> Reading:
    files = {split: [name for name in names if name in package] for split, names in version.files.items()}
    absent = [name for split, names in version.files.items() for name in names if name not in files[split]]
    if absent and not source.partial:
        raise source.missing(f"{', '.join(absent)} in {package.path.name}")
    if package.is_archive:
        source.add(package.path.parent, [package.path.name])
    else:
        source.add(package.path, [version.classes, *(name for names in files.values() for name in names)])
    classes = _classes(package, version, number)
    splits = {}
    for split, names in files.items():
        if names:
            # Every file is decoded here once before: what is wrong with the last is said before the first is used.
            count = sum(len(_batch(package, name, version, number)[1]) for name in names)
            splits[split] = Split(count, partial(_chunks, package, names, version, number))
    return Reading(classes, splits)


def _chunks(package: Package, names: list[str], version: _Version, number: int) -> Iterator[Chunk]:
    for name in names:
        yield from in_chunks(*_batch(package, name, version, number))


def _batch(package: Package, name: str, version: _Version, number: int) -> Chunk:
    content, where = package.read(name), package.where(name)
    if isinstance(version.labels, str):
        return image_batch(content, where, labels=version.labels, classes=number)
    return _records(content, where, version.labels, number)


def _records(content: bytes, where: str, label_bytes: int, number: int) -> Chunk:
    """Records of ``label_bytes`` and an image each."""
    record = label_bytes + _IMAGE
    if not content or len(content) % record:
        raise DataError(
            f"{where}: expected records of {record} bytes, got {len(content):,} bytes; it is truncated: get it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = checked_labels(records[:, label_bytes - 1], number, where)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _classes(package: Package, version: _Version, number: int) -> tuple[str, ...]:
    content, where = package.read(version.classes), package.where(version.classes)
    names: Any = unpickle(content, where).get(version.names) if version.names else content.decode("latin1").split()
    if not (isinstance(names, list) and len(set(map(str, names))) == len(names) == number):
        raise DataError(f"{where}: expected the names of {number} classes, got {names!r}; get it again")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)


CIFAR10 = Format(
    partial(_read, _CIFAR10, 10),
    Published(
        "CIFAR-10",
        _URL,
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz, as it is or extracted",
        _SIZES,
        (3, 32, 32),
        10,
        md5={
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
)
CIFAR100 = Format(
    partial(_read, _CIFAR100, 100),
    Published(
        "CIFAR-100",
        _URL,
        "cifar-100-python.tar.gz or cifar-100-binary.tar.gz, as it is or extracted",
        _SIZES,
        (3, 32, 32),
        100,
        md5={
            "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
)
