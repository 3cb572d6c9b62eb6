"""From the files that a data set is published in to a store that training reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from dpfast.data.formats import Chunk, Split, canonical_name, format_of
from dpfast.data.formats.source import Source
from dpfast.data.pictures import RESIZING, resized
from dpfast.data.store import Store, open_store
from dpfast.data.store_writer import StoreWriter
from dpfast.errors import ConfigError
from dpfast.files import is_there
from dpfast.progress import Progress, silent


def prepare_store(
    name: str,
    source: Path,
    folder: Path,
    *,
    size: int | None = None,
    partial: bool = False,
    progress: Progress = silent,
) -> Store:
    """Read the data set at ``source``, a file or folder, and write its store to ``folder``, whole or not at all.

    name: a published data set (``dpfast.data.formats.PUBLISHED``; "CIFAR-10" is "cifar10"), whose sizes and checksums
    must be those published; any other name is for one's own images in class folders, npz, HDF5, Parquet or Arrow files.
    size: images are cropped and scaled to ``size`` by ``size`` pixels; None keeps them as they are (Camelyon17: 32).
    partial: it may be a part of what was published under the name, which the store says.

    Warns of classes of one's own that have no image in the train split.

    Raises:
        ConfigError: the name or an option cannot be used.
        DataError: the data set is not there, or not as expected; ``folder`` holds another store.
        FileError: a file cannot be read, or is damaged; the disk is full.
    """
    name = canonical_name(name)
    if size is not None and size < 1:
        raise ConfigError(f"size must be at least 1 pixel, got {size}")
    form = format_of(name, source)
    if partial and form.published is None:
        raise ConfigError(f"partial: nothing is published of {name!r} to be a part of; leave it out")
    files = Source(source, published=form.published, size=size or form.size, partial=partial)
    if not is_there(source):
        raise files.missing("a file or folder")
    reading = form.read(files)
    if form.published is not None and not partial:
        form.published.check_sizes(reading.splits)
    resizing = RESIZING.format(size=files.size) if files.size else ""
    with StoreWriter(folder, name=name, classes=reading.classes, resizing=resizing, partial=partial) as writer:
        done, total = 0, sum(split.count for split in reading.splits.values())
        for split, part in reading.splits.items():
            writer.add(split, part.count, _reported(part, files.size, progress, done, total, split))
            done += part.count
        store = writer.finish(source=files.record())
    if form.published is None and "train" in store.splits:
        _warn_of_empty_classes(folder, source)
    return store


def _warn_of_empty_classes(folder: Path, source: Path) -> None:
    train = open_store(folder, "train")
    counts = train.labels.bincount(minlength=train.num_classes)
    empty = [name for name, count in zip(train.classes, counts.tolist(), strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:20]) + (", ..." if len(empty) > 20 else "")
        warnings.warn(
            f"{source}: classes without an image in the train split: {shown} ({len(empty)} of {train.num_classes}); "
            "add images of them, or number the others from 0 without a gap",
            stacklevel=3,
        )


def _reported(part: Split, size: int | None, progress: Progress, done: int, total: int, split: str) -> Iterator[Chunk]:
    for images, labels in part.chunks():
        yield (images if size is None else resized(images, size)), labels
        done += len(images)
        progress(done, total, split)
