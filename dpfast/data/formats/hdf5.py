"""Arrays of an HDF5 file, read by h5py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpfast.data.formats.npz import Header
from dpfast.data.formats.reading import CHUNK, Chunk, readable, require


class Hdf5File:
    """names: of its arrays, with those of their groups ("train/images").

    Raises FileError where the file turns out to be damaged, ConfigError if h5py is not installed.
    """

    def __init__(self, path: Path) -> None:
        require("h5py", path)
        import h5py

        self.path = path
        self.names: list[str] = []

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                self.names.append(name)

        with readable(str(path)), h5py.File(path, "r") as file:
            file.visititems(note)

    def header(self, name: str) -> Header:
        """Of an array of which nothing else is read."""
        import h5py

        with readable(f"{self.path} ({name})"), h5py.File(self.path, "r") as file:
            return file[name].shape, file[name].dtype

    def load(self, name: str) -> np.ndarray:
        """A small array whole."""
        import h5py

        with readable(f"{self.path} ({name})"), h5py.File(self.path, "r") as file:
            return np.asarray(file[name][()])

    def chunks(self, name: str, labels: np.ndarray) -> Iterator[Chunk]:
        """Rows of an array, some at a time, with their labels."""
        import h5py

        with readable(f"{self.path} ({name})"), h5py.File(self.path, "r") as file:
            for start in range(0, len(labels), CHUNK):
                part = labels[start : start + CHUNK]
                yield file[name][start : start + len(part)], part
