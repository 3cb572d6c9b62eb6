"""Parquet and Arrow files, read by pyarrow some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpfast.data.formats.reading import readable, require

if TYPE_CHECKING:
    import pyarrow

ROWS = 64  # of encoded images of any size


class TableFile(Protocol):
    """``ParquetFile`` or ``ArrowFile``."""

    path: Path
    schema: pyarrow.Schema

    def column(self, name: str) -> Iterator[pyarrow.Array]:
        """At most ``ROWS`` values at a time. Raises FileError where the file is damaged."""


class ParquetFile:
    """Raises FileError if it is damaged, ConfigError if pyarrow is not installed."""

    def __init__(self, path: Path) -> None:
        require("pyarrow", path)
        import pyarrow.parquet as parquet

        self.path = path
        with readable(str(path)):
            self.schema = parquet.read_schema(path)

    def column(self, name: str) -> Iterator[pyarrow.Array]:
        import pyarrow.parquet as parquet

        with readable(str(self.path)), parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
                yield _whole(batch.column(name))


class ArrowFile:
    """Raises FileError if it is damaged, ConfigError if pyarrow is not installed."""

    def __init__(self, path: Path) -> None:
        require("pyarrow", path)
        self.path = path
        with readable(str(path)), _reader(path) as reader:
            self.schema = reader.schema

    def column(self, name: str) -> Iterator[pyarrow.Array]:
        with readable(str(self.path)), _reader(self.path) as reader:
            for batch in _batches(reader):
                values = _whole(batch.column(name))
                for start in range(0, batch.num_rows, ROWS):
                    yield values.slice(start, ROWS)


def _whole(values: pyarrow.Array) -> pyarrow.Array:
    """The same, checked: reading trusts a file's offsets, and takes bytes from wherever they point to."""
    values.validate(full=True)
    return values


def _reader(path: Path) -> Any:
    """``datasets`` writes the streaming format; Feather files are of the other one, with an index at their end."""
    import pyarrow

    with open(path, "rb") as file:
        indexed = file.read(6) == b"ARROW1"
    mapped = pyarrow.memory_map(str(path))
    return pyarrow.ipc.open_file(mapped) if indexed else pyarrow.ipc.open_stream(mapped)


def _batches(reader: Any) -> Iterator[pyarrow.RecordBatch]:
    if hasattr(reader, "num_record_batches"):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader
