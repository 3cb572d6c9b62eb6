"""Camelyon17 as WILDS publishes it: 96x96 patches of lymph nodes from five hospitals, with tumor in the centre or not.

Koh et al., "WILDS: A Benchmark of in-the-Wild Distribution Shifts", 2021. Its official splits go by hospital ("center"
0..4): center 1 is the validation set "val", center 2 the test set "test", the others are "train" (``split`` 0) and
"id_val" (``split`` 1).
"""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dpfast.data.formats.reading import Chunk, Published, Reading, Split, checked_labels, readable
from dpfast.data.formats.source import Format, Source
from dpfast.data.pictures import decode
from dpfast.errors import DataError

_FOLDER = "camelyon17_v1.0"
_METADATA = "metadata.csv"
_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
_SPLITS = ("train", "id_val", "val", "test")
_CENTERS = {1: "val", 2: "test"}
_CLASSES = ("normal", "tumor")
_SIDE = 96
_STORED = 32
_CHUNK = 256  # patches: 7 MB when they are decoded


def _read(source: Source) -> Reading:
    roots = (source.path, source.path / _FOLDER)
    root = next((root for root in roots if (root / _METADATA).is_file()), None)
    if root is None:
        raise source.missing(f"{_METADATA} and patches/ of {_FOLDER}")
    source.add(root, [_METADATA])
    table = _table(root / _METADATA)
    tumor = checked_labels(table[:, 4], 2, f"{root / _METADATA}, column tumor")
    split = _split_of(table, root / _METADATA)
    _check_patches(root, table)
    splits = {}
    for number, name in enumerate(_SPLITS):
        rows = split == number
        if rows.any():
            chunks = partial(_chunks, source, root, table[rows], tumor[rows])
            splits[name] = Split(int(rows.sum()), chunks)
    return Reading(_CLASSES, splits)


def _table(path: Path) -> np.ndarray:
    """int64 ``[n, 7]``: the columns ``_COLUMNS``."""
    with readable(str(path)), open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        absent = sorted(set(_COLUMNS) - set(rows.fieldnames or ()))
        if absent:
            raise DataError(
                f"{path}: expected the columns {', '.join(_COLUMNS)}, lacks {', '.join(absent)}; get it again"
            )
        return np.array([[int(row[column]) for column in _COLUMNS] for row in rows], np.int64).reshape(
            -1, len(_COLUMNS)
        )


def _split_of(table: np.ndarray, path: Path) -> np.ndarray:
    """Of each row the number of its split in ``_SPLITS``."""
    center, split = table[:, 5], table[:, 6].copy()
    strange = ~np.isin(center, range(5)) | ~np.isin(split, (0, 1))
    if strange.any():
        row = int(strange.argmax())
        raise DataError(
            f"{path}: expected center 0..4 and split 0 or 1, got center {center[row]} and split {split[row]} in row "
            f"{row}; get it again"
        )
    for number, name in _CENTERS.items():
        split[center == number] = _SPLITS.index(name)
    return split


def _check_patches(root: Path, table: np.ndarray) -> None:
    """Raises DataError that counts the patches which are not there. Folders are listed: a stat each takes minutes."""
    there: dict[str, set[str]] = {}
    absent = []
    for row in table:
        folder, name = _patch(row)
        if folder not in there:
            path = root / folder
            there[folder] = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if name not in there[folder]:
            absent.append(f"{folder}/{name}")
    if absent:
        raise DataError(
            f"{root}: {len(absent):,} of {len(table):,} patches named in {_METADATA} are missing, the first of them "
            f"{absent[0]}; extract the archive again"
        )


def _chunks(source: Source, root: Path, table: np.ndarray, tumor: np.ndarray) -> Iterator[Chunk]:
    for start in range(0, len(table), _CHUNK):
        rows = table[start : start + _CHUNK]
        yield np.stack([_image(source, root, row) for row in rows]), tumor[start : start + _CHUNK]


def _image(source: Source, root: Path, row: np.ndarray) -> np.ndarray:
    folder, name = _patch(row)
    content = source.image(root, f"{folder}/{name}", folder="patches")
    where = str(root / folder / name)
    image = decode(content, where, channels=3)
    if image.shape != (3, _SIDE, _SIDE):
        raise DataError(f"{where}: expected {_SIDE}x{_SIDE} pixels, got {image.shape[1:]}; extract the archive again")
    return image


def _patch(row: np.ndarray) -> tuple[str, str]:
    """(folder, name) of the file of a row."""
    patient, node, x, y = row[:4]
    slide = f"patient_{patient:03}_node_{node}"
    return f"patches/{slide}", f"patch_{slide}_x_{x}_y_{y}.png"


CAMELYON17 = Format(
    _read,
    Published(
        "Camelyon17 (WILDS)",
        "https://wilds.stanford.edu/datasets/",
        f"the folder {_FOLDER} with {_METADATA} and patches/",
        {"train": 302_436, "id_val": 33_560, "val": 34_904, "test": 85_054},
        (3, _STORED, _STORED),
        len(_CLASSES),
        terms="CC0",
    ),
    size=_STORED,
)
