"""Arrays of an npz file, large ones as streams: 5 GB of them need no 5 GB of memory."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dpfast.data.formats.reading import CHUNK, Chunk, readable
from dpfast.errors import DataError

Header = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and dtype of an array."""


class NpzFile:
    """names: of its arrays. Raises FileError where the file turns out to be damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(str(path)), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def header(self, name: str) -> Header:
        """Of an array of which nothing else is read. Raises DataError if there is none of that name."""
        if name not in self.names:
            raise DataError(
                f"{self.path}: expected an array {name!r}, got {', '.join(self.names) or 'none'}; name it so"
            )
        with self._opened(name) as file:
            shape, columns_first, dtype = _header(file)
        if columns_first and len(shape) > 1:
            raise DataError(f"{self.path}: {name} is stored column by column; save np.ascontiguousarray of it")
        return shape, dtype

    def load(self, name: str) -> np.ndarray:
        """A small array whole. Raises DataError for pickled objects, which would run code."""
        if self.header(name)[1].hasobject:
            what, kind = ("texts", "str") if name == "classes" else ("whole numbers", "np.int64")
            raise DataError(f"{self.path} ({name}): expected {what}, got Python objects; save {name}.astype({kind})")
        with readable(f"{self.path} ({name})"), np.load(self.path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])

    def chunks(self, name: str, labels: np.ndarray) -> Iterator[Chunk]:
        """Rows of an array, some at a time, with their labels."""
        with self._opened(name) as file:
            (_, *row), _, dtype = _header(file)
            for start in range(0, len(labels), CHUNK):
                part = labels[start : start + CHUNK]
                content = file.read(len(part) * math.prod(row) * dtype.itemsize)
                yield np.frombuffer(content, dtype).reshape(len(part), *row), part
            file.read()  # to its end: there the checksum of the zip file is compared

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        with (
            readable(f"{self.path} ({name})"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as file,
        ):
            yield file


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
