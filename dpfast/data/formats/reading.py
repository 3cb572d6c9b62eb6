"""What every format gives: classes, and splits whose number of images is known before the first of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dpfast.errors import ConfigError, DataError, DPFastError, FileError

CHUNK = 1024  # images: 3 MB of 32x32 in colour, and so many that the Python between two chunks does not count

Chunk = tuple[np.ndarray, np.ndarray]
"""Images uint8 ``[m, C, H, W]`` and their labels int64 ``[m]``."""

OWN_LABELS = "number the classes from 0, and name all if any are named, or leave these images out"
"""The cure of labels out of range in one's own files, of which there is no other copy to get."""

MOST_CLASSES = 1_000_000  # that come without names


@dataclass(frozen=True)
class Split:
    """``count`` images, which ``chunks()`` gives in their order."""

    count: int
    chunks: Callable[[], Iterator[Chunk]]


@dataclass(frozen=True)
class Reading:
    """A data set that was found and whose sizes, shapes and labels fit; its pixels are still to be read."""

    classes: tuple[str, ...]
    splits: dict[str, Split]


@dataclass(frozen=True)
class Published:
    """What is known of a data set that everybody has under the same name.

    url: the page that publishes it; terms: its licence, where that is certain; files: what to place in the source
    folder; sizes: images of each split; shape: (C, H, W) in the store; classes: how many; md5: published or widely
    known checksums by file name.
    """

    title: str
    url: str
    files: str
    sizes: Mapping[str, int]
    shape: tuple[int, int, int]
    classes: int
    terms: str = ""
    md5: Mapping[str, str] = field(default_factory=dict)

    def check_sizes(self, splits: Mapping[str, Split]) -> None:
        """Raises DataError, for all splits at once, if one is missing or has another number of images."""
        found = {name: split.count for name, split in splits.items()}
        if found != self.sizes:
            raise DataError(
                f"{self.title}: expected {_counts(self.sizes)}, got {_counts(found)}; complete it from {self.url}, "
                "or say that it is a part (partial=True, --partial)"
            )


@contextmanager
def readable(where: str) -> Iterator[None]:
    """FileError that names ``where`` for whatever the reading of a damaged file raises."""
    try:
        yield
    except DPFastError:
        raise
    except PermissionError as error:
        raise FileError(f"{where} cannot be read ({error.strerror}); change its permissions") from error
    except Exception as error:  # libraries raise anything from OSError to zlib.error and struct.error
        raise FileError(
            f"{where} cannot be read ({str(error) or type(error).__name__}); it is truncated or damaged: get it again"
        ) from error


def require(package: str, path: Path) -> None:
    """ConfigError that says how to install what reads ``path``, if it is not."""
    if find_spec(package) is None:
        raise ConfigError(f"{path} is read by {package}, which is not installed: pip install 'dpfast[data]'")


def checked_labels(
    labels: Any,
    classes: int,
    where: str,
    *,
    first: int = 0,
    cure: str = "the file is damaged or of another data set: get it again",
) -> np.ndarray:
    """Labels counted from ``first`` as int64 ``[n]`` in 0..classes-1. Raises DataError that names ``where``.

    cure: of labels out of range.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:  # a column, as MedMNIST has them
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels must be whole numbers, one per image, got {array.dtype} of shape {array.shape}; "
            "store the number of each image's class"
        )
    wrong = np.flatnonzero((array < first) | (array >= first + classes))
    if len(wrong):
        raise DataError(
            f"{where}: labels must lie in {first}..{first + classes - 1} ({classes} classes), got {array[wrong[0]]} at "
            f"position {wrong[0]} ({len(wrong)} such); {cure}"
        )
    return array.astype(np.int64) - first


def numbered(labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """Names "0", "1", ... for labels that come without: one at least, and as many as the largest label asks for.

    Raises DataError for more classes than any data set has.
    """
    largest = max([0, *(int(array.max()) for array in labels if array.dtype.kind in "iu" and array.size)])
    if largest >= MOST_CLASSES:
        raise DataError(f"labels go up to {largest}, expected less than {MOST_CLASSES:,}: number the classes from 0")
    return tuple(str(i) for i in range(largest + 1))


def in_chunks(images: np.ndarray, labels: np.ndarray) -> Iterator[Chunk]:
    """Arrays that are in memory anyway, a chunk at a time."""
    for start in range(0, len(images), CHUNK):
        yield images[start : start + CHUNK], labels[start : start + CHUNK]


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sizes.items()) or "nothing"
