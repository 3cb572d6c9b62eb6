"""Data sets in the files that they are published in, one module per format; nothing is ever downloaded."""

import os
import re
from pathlib import Path

from dpfast.data.formats.arrays import HDF5, NPZ
from dpfast.data.formats.camelyon17 import CAMELYON17
from dpfast.data.formats.cifar import CIFAR10, CIFAR100
from dpfast.data.formats.idx import FASHION_MNIST, MNIST
from dpfast.data.formats.image_folder import IMAGE_FOLDER
from dpfast.data.formats.imagenet32 import IMAGENET32
from dpfast.data.formats.reading import Chunk, Published, Reading, Split
from dpfast.data.formats.source import Format, Source
from dpfast.data.formats.tables import ARROW, PARQUET
from dpfast.data.pictures import SUFFIXES
from dpfast.errors import ConfigError, DataError

__all__ = ["PUBLISHED", "Chunk", "Format", "Published", "Reading", "Source", "Split", "canonical_name", "format_of"]

PUBLISHED = {
    "camelyon17": CAMELYON17,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "fashionmnist": FASHION_MNIST,
    "imagenet32": IMAGENET32,
    "mnist": MNIST,
}
_BY_SUFFIX = {".npz": NPZ, ".h5": HDF5, ".hdf5": HDF5, ".parquet": PARQUET, ".arrow": ARROW}


def canonical_name(name: str) -> str:
    """``CIFAR-10`` -> ``cifar10``: a published data set has one name; others keep theirs. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"name must be letters, digits, '.', '_' and '-', got {name!r}; name the data set so")
    plain = re.sub(r"[\W_]", "", name).lower()
    return plain if plain in PUBLISHED else name


def format_of(name: str, path: Path) -> Format:
    """That of a published data set; of others the one that the suffixes of their files tell. Raises DataError."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    suffixes = _suffixes(path)
    for suffix, form in _BY_SUFFIX.items():
        if suffix in suffixes:  # before images: who publishes tables likes to show a few beside them
            return form
    if suffixes & set(SUFFIXES):
        return IMAGE_FOLDER
    found = "found none" if path.exists() else "there is nothing of that name"
    raise DataError(
        f"{path}: expected files of one of {', '.join([*_BY_SUFFIX, *SUFFIXES])}, {found}; give such a folder or file, "
        f"or the name of a published data set: {', '.join(PUBLISHED)}"
    )


def _suffixes(path: Path) -> set[str]:
    if path.is_file():
        return {path.suffix.lower()}
    return {Path(name).suffix.lower() for _, _, names in os.walk(path, followlinks=True) for name in names}
