"""Parquet and Arrow files as Hugging Face's ``datasets`` writes them.

A row has an image (a struct of ``bytes`` and ``path``, or the bytes themselves: an encoded PNG, JPEG, ...) and a label
(a whole number). Which columns these are, and the names of the classes, stand in the schema's metadata under
"huggingface"; without it the columns are told by type and name. The split is told by the names of files and folders.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfast.data.formats.arrays import files_of
from dpfast.data.formats.columnar import ArrowFile, ParquetFile, TableFile
from dpfast.data.formats.reading import OWN_LABELS, Chunk, Reading, Split, checked_labels, numbered, readable
from dpfast.data.formats.source import Format, Source
from dpfast.data.formats.splits import split_of
from dpfast.data.pictures import decode, peek
from dpfast.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_IMAGES = ("image", "img")  # the first of them that is there, where several columns would do
_LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class _Columns:
    """Names of the two columns, and of the classes where the metadata tells them."""

    image: str
    label: str
    classes: tuple[str, ...] | None


Part = tuple[TableFile, np.ndarray]
"""A file and the labels int64 ``[n]`` of its rows."""


def _read(suffix: str, opened: Callable[[Path], TableFile], source: Source) -> Reading:
    root, paths = files_of(source.path, [suffix])
    paths = [path for path in paths if not path.name.startswith("cache-")]  # what somebody's map() left there
    if not paths:
        raise source.missing(f"files *{suffix}")
    source.add(root, [path.relative_to(root).as_posix() for path in paths])
    files = [opened(path) for path in paths]
    columns = _columns(files)
    labels = [_labels(file, columns.label) for file in files]
    classes = columns.classes or numbered(labels)
    parts: dict[str, list[Part]] = {}
    for file, numbers in zip(files, labels, strict=True):
        where = f"{file.path}, column {columns.label}"
        checked = checked_labels(numbers, len(classes), where, cure=OWN_LABELS)
        parts.setdefault(split_of(file.path.relative_to(root)), []).append((file, checked))
    return Reading(classes, {split: _split(source, of_split, columns.image) for split, of_split in parts.items()})


def _split(source: Source, parts: list[Part], column: str) -> Split:
    count = sum(len(labels) for _, labels in parts)
    if not count:
        names = ", ".join(str(file.path) for file, _ in parts)
        raise DataError(f"{names}: no rows, so no images; add some, or leave the split out")
    return Split(count, partial(_chunks, source, parts, column))


def _columns(files: list[TableFile]) -> _Columns:
    """Raises DataError if they are not the same in all files."""
    first, *others = [(file, _columns_of(file.schema, file.path)) for file in files]
    for file, columns in others:
        if columns != first[1]:
            raise DataError(
                f"{file.path}: expected image, label and classes as in {first[0].path} ({first[1]}), got {columns}; "
                "keep the files of one data set in the folder"
            )
    return first[1]


def _columns_of(schema: pyarrow.Schema, path: Path) -> _Columns:
    import pyarrow.types as types

    with readable(str(path)):
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [f.name for f in schema if _holds_image(f.type) and kinds.get(f.name, "Image") == "Image"]
    numbers = [f.name for f in schema if types.is_integer(f.type)]
    labels = [name for name in numbers if kinds.get(name) == "ClassLabel"] or numbers
    image = _one(images, _IMAGES, "bytes, or of structs with bytes", schema, path)
    label = _one(labels, _LABELS, "whole numbers", schema, path)
    names = features.get(label, {}).get("names")
    return _Columns(image, label, tuple(map(str, names)) if names else None)


def _holds_image(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _one(found: list[str], preferred: tuple[str, ...], what: str, schema: pyarrow.Schema, path: Path) -> str:
    named = found if len(found) == 1 else [name for name in preferred if name in found]
    if not named:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{path}: expected one column of {what}, or one named {' or '.join(preferred)}, got {columns}; rename it so"
        )
    return named[0]


def _labels(file: TableFile, column: str) -> np.ndarray:
    parts = list(file.column(column))
    if missing := sum(part.null_count for part in parts):
        raise DataError(f"{file.path}: expected a {column} in each row, got {missing} rows without; remove those rows")
    return np.concatenate([np.zeros(0, np.int64), *(part.cast("int64").to_numpy() for part in parts)])


def _chunks(source: Source, parts: list[Part], column: str) -> Iterator[Chunk]:
    channels = 0
    for file, labels in parts:
        start = 0
        for values in file.column(column):
            contents = _encoded(values.to_pylist(), file.path, column)
            rows = [(content, f"{file.path}, row {start + i}") for i, content in enumerate(contents)]
            # What the first images have, all must: a set of grey ones is not made colour by its last.
            channels = channels or max(peek(io.BytesIO(content), where)[0] for content, where in rows)
            images = [decode(content, where, channels=channels, size=source.size) for content, where in rows]
            yield _stacked(images, [where for _, where in rows]), labels[start : start + len(rows)]
            start += len(rows)


def _encoded(values: list[Any], path: Path, column: str) -> list[bytes]:
    contents = [value["bytes"] if isinstance(value, dict) else value for value in values]
    if None in contents:
        raise DataError(
            f"{path}: expected the bytes of each image in column {column}, got rows without; have datasets embed "
            "them, as push_to_hub does"
        )
    return contents


def _stacked(images: list[np.ndarray], places: list[str]) -> np.ndarray:
    for image, place in zip(images, places, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{place}: expected {images[0].shape} (C, H, W) as in {places[0]}, got {image.shape}; choose one size "
                "(size=32, --size 32)"
            )
    return np.stack(images)


PARQUET = Format(partial(_read, ".parquet", ParquetFile))
ARROW = Format(partial(_read, ".arrow", ArrowFile))
