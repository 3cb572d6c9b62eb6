"""Writing a store: chunk by chunk, and whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from dpfast.data.formats.reading import Chunk, checked_labels
from dpfast.data.store import MANIFEST, Store, StoredFile, StoredSplit, read_store
from dpfast.errors import DataError, FileError, RunLocked
from dpfast.files import lock, remove, sync_folder, write_json


class StoreWriter:
    """A store that is at ``folder`` once ``finish`` is called; nothing of it is there before.

        with StoreWriter(folder, name="scans", classes=("benign", "malignant")) as writer:
            writer.add("train", count, chunks)
            writer.finish(source=[])

    Raises DataError if ``folder`` holds anything but the store that comes out; RunLocked while another process writes
    it; FileError where nothing can be written.
    """

    def __init__(
        self, folder: Path, *, name: str, classes: tuple[str, ...], resizing: str = "", partial: bool = False
    ) -> None:
        self.folder = folder
        self.name = name
        self.classes = classes
        self.resizing = resizing
        self.partial = partial
        # One fixed name: what a kill leaves behind is overwritten by the next attempt, and nobody reads it.
        self._temporary = folder.with_name(f".{folder.name}.tmp")
        self._shape: tuple[int, int, int] | None = None
        self._splits: dict[str, StoredSplit] = {}

    def __enter__(self) -> Self:
        self._check_place()
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot write {self._temporary} ({error.strerror}); choose another folder") from error
        self._lock = os.open(self._temporary, os.O_RDONLY)
        if not lock(self._lock, self._temporary):
            os.close(self._lock)
            raise RunLocked(f"another process is writing {self.folder}; wait for it, or choose another folder")
        for path in self._temporary.iterdir():
            remove(path)
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary.exists():  # it was not finished, or is there already
            remove(self._temporary)
        os.close(self._lock)

    def add(self, split: str, count: int, chunks: Iterable[Chunk]) -> None:
        """Write a split of ``count`` images that come as (uint8 ``[m, C, H, W]``, int64 ``[m]``), some at a time.

        Raises DataError for another number of images, images of another shape or dtype than the first of the store, and
        labels out of range; FileError if the disk is full.
        """
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            raise DataError(f"split {split!r}: expected {count or 'some'} images, got none; get the source again")
        folder = self._temporary / split
        folder.mkdir()
        done = 0
        with (
            _Array(folder / "images.npy", np.dtype("u1"), (count, *first[0].shape[1:])) as images,
            _Array(folder / "labels.npy", np.dtype("<i8"), (count,)) as labels,
        ):
            for pixels, numbers in itertools.chain([first], chunks):
                self._check(pixels, numbers, f"split {split!r}, images from {done}")
                images.append(pixels)
                labels.append(numbers)
                done += len(pixels)
            if done != count:
                raise DataError(f"split {split!r}: expected {count} images, got {done}; get the source again")
            self._splits[split] = StoredSplit(count, images.finish(), labels.finish())
        sync_folder(folder)

    def finish(self, *, source: list[dict[str, Any]]) -> Store:
        """Move the store to its folder; ``source`` is the record of what it was made from."""
        if self._shape is None:
            raise DataError(f"{self.folder}: expected at least one split, got none; add one")
        store = Store(self.name, self.partial, self.resizing, self.classes, self._shape, self._splits, source)
        write_json(self._temporary / MANIFEST, store.to_json())
        if not _is_free(self.folder):
            if read_store(self.folder) != store:
                raise self._occupied("made from other files")
            return store
        os.rename(self._temporary, self.folder)
        sync_folder(self.folder.parent)
        return store

    def _check_place(self) -> None:
        """What can be told before anything is written."""
        if _is_free(self.folder):
            return
        if not (self.folder / MANIFEST).exists():
            raise DataError(f"{self.folder} is there already and is no store; choose another folder")
        found = read_store(self.folder)
        for what in ("name", "classes", "resizing", "partial"):
            if getattr(found, what) != getattr(self, what):
                raise self._occupied(f"{what} {getattr(found, what)!r}, expected {getattr(self, what)!r}")

    def _occupied(self, difference: str) -> DataError:
        return DataError(
            f"{self.folder} holds another store ({difference}); choose another folder, or remove it to make it anew"
        )

    def _check(self, pixels: np.ndarray, numbers: np.ndarray, where: str) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (self._shape or pixels.shape[1:]):
            shape = ", ".join(map(str, self._shape or ("C", "H", "W")))
            raise DataError(
                f"{where}: expected uint8 [m, {shape}], got {pixels.dtype} {list(pixels.shape)}; choose one size for "
                "all (size=32, --size 32)"
            )
        if len(checked_labels(numbers, len(self.classes), where)) != len(pixels):
            raise DataError(f"{where}: expected {len(pixels)} labels, got {len(numbers)}; give one per image")
        self._shape = pixels.shape[1], pixels.shape[2], pixels.shape[3]


class _Array:
    """An npy file of known shape that is written in parts, its checksum taken on the way."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._path = path
        self._dtype = dtype
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a disk that is full, as write() has said
            self._file.close()

    def append(self, part: np.ndarray) -> None:
        self.write(np.ascontiguousarray(part, self._dtype).reshape(-1).view(np.uint8).data)

    def write(self, content: bytes | memoryview) -> None:
        """As a file has it, for numpy to write the header."""
        self._digest.update(content)
        self._bytes += len(content)
        with _room_for(self._path):
            self._file.write(content)

    def finish(self) -> StoredFile:
        with _room_for(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return StoredFile(self._bytes, self._digest.hexdigest())


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path} ({error.strerror}); make room, then run again") from error


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
