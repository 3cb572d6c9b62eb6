"""One's own arrays in npz or HDF5 files: ``images`` uint8 and ``labels``, whole numbers, for each split.

They are named images and labels, or train_images, train_labels, test_images, ... (in HDF5 also train/images). Without a
split in their names the file's name tells it, "train" otherwise. Images are [n, H, W], [n, H, W, C] or [n, C, H, W]
with C 1 or 3; an array ``classes`` of texts names the classes.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpfast.data.formats.hdf5 import Hdf5File
from dpfast.data.formats.npz import Header, NpzFile
from dpfast.data.formats.reading import OWN_LABELS, Chunk, Reading, Split, checked_labels, numbered
from dpfast.data.formats.source import Format, Source
from dpfast.data.formats.splits import split_name, split_of
from dpfast.errors import DataError

_NAME = re.compile(r"(?:(?P<split>[a-zA-Z0-9]+)[_/])?(?P<what>images|labels)")


class ArrayFile(Protocol):
    """``NpzFile`` or ``Hdf5File``."""

    path: Path
    names: list[str]

    def header(self, name: str) -> Header: ...
    def load(self, name: str) -> np.ndarray: ...
    def chunks(self, name: str, labels: np.ndarray) -> Iterator[Chunk]: ...


Pairs = dict[str, tuple[ArrayFile, dict[str, str]]]
"""Of each split its file, and the names there of its "images" and "labels"."""


def files_of(path: Path, suffixes: Iterable[str]) -> tuple[Path, list[Path]]:
    """(folder, files): ``path`` itself, or all files of these suffixes below it, in the order of their names."""
    if path.is_file():
        return path.parent, [path]
    return path, sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


def _read(suffixes: tuple[str, ...], opened: Callable[[Path], ArrayFile], source: Source) -> Reading:
    root, paths = files_of(source.path, suffixes)
    source.add(root, [path.relative_to(root).as_posix() for path in paths])
    pairs = _pairs([opened(path) for path in paths], root)
    classes = _classes(pairs)
    return Reading(classes, {split: _split(file, names, len(classes)) for split, (file, names) in pairs.items()})


def _pairs(files: list[ArrayFile], root: Path) -> Pairs:
    """Raises DataError if a file has no pair or half of one, or two files have the same split."""
    pairs: Pairs = {}
    for file in files:
        of_file: dict[str, dict[str, str]] = {}
        for match in filter(None, map(_NAME.fullmatch, file.names)):
            split = split_name(match["split"]) if match["split"] else split_of(file.path.relative_to(root))
            names = of_file.setdefault(split or match["split"], {})
            if match["what"] in names:
                raise DataError(f"{file.path}: {names[match['what']]} and {match.string} are the same split; keep one")
            names[match["what"]] = match.string
        if not of_file or any(len(names) < 2 for names in of_file.values()):
            raise DataError(
                f"{file.path}: expected arrays 'images' and 'labels' (or train_images, train_labels, ...), got "
                f"{', '.join(file.names) or 'none'}; name them so"
            )
        for split in pairs.keys() & of_file.keys():
            raise DataError(f"{file.path}: the split {split!r} is in {pairs[split][0].path} too; keep one of the two")
        pairs |= {split: (file, names) for split, names in of_file.items()}
    return pairs


def _classes(pairs: Pairs) -> tuple[str, ...]:
    """As named by the first file that names them."""
    for file, _ in pairs.values():
        if "classes" in file.names:
            return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in file.load("classes").ravel().tolist())
    return numbered([file.load(names["labels"]) for file, names in pairs.values()])


def _split(file: ArrayFile, names: dict[str, str], classes: int) -> Split:
    where = f"{file.path} ({names['images']})"
    shape, dtype = file.header(names["images"])
    if shape[:1] == (0,):
        raise DataError(f"{where} holds no images; save some, or leave these arrays out")
    labels = checked_labels(file.load(names["labels"]), classes, f"{file.path} ({names['labels']})", cure=OWN_LABELS)
    axes = _channels_first(shape, where)
    if len(labels) != shape[0]:
        raise DataError(
            f"{where}: expected a label per image, got {shape[0]} images and {len(labels)} labels; save both anew"
        )
    if dtype != np.uint8:
        raise DataError(
            f"{where}: images must be uint8 in 0..255, got {dtype}{_conversion(file, names, dtype, labels)}"
        )
    return Split(len(labels), partial(_chunks, file, names["images"], labels, axes))


def _conversion(file: ArrayFile, names: dict[str, str], dtype: np.dtype[Any], labels: np.ndarray) -> str:
    """The cure of images of another dtype, after the first number of them that is not finite, if there is one."""
    if dtype.kind != "f":
        return "; scale them to 0..255 if they are not, and save images.astype(np.uint8)"
    strange, done = "", 0
    for pixels, part in file.chunks(names["images"], labels):
        found = np.argwhere(~np.isfinite(pixels))
        if len(found):
            image, *place = found[0].tolist()
            value = pixels[tuple(found[0])]
            strange = f", with {value} in image {done + image} at {place}; replace what is not finite"
            break
        done += len(part)
    return f"{strange}; scale them to 0..255, round and save images.astype(np.uint8)"


def _chunks(file: ArrayFile, name: str, labels: np.ndarray, axes: tuple[int, ...] | None) -> Iterator[Chunk]:
    for pixels, part in file.chunks(name, labels):
        yield (pixels[:, None] if axes is None else pixels.transpose(axes)), part


def _channels_first(shape: tuple[int, ...], where: str) -> tuple[int, ...] | None:
    """The order of axes in which ``shape`` is [n, C, H, W]; None where C is to be added.

    Raises DataError if there is none, or two.
    """
    if len(shape) == 3:
        return None
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if first != last:
        return (0, 1, 2, 3) if first else (0, 3, 1, 2)
    if first:
        cure = "which axis is C is unclear: save images that are larger than 3x3"
    elif len(shape) == 4 and 4 in (shape[1], shape[3]):
        cure = "images of 4 channels: drop the alpha channel, or convert them to RGB"
    else:
        cure = "transpose them, or keep 1 or 3 channels"
    raise DataError(
        f"{where}: images must be [n, H, W], [n, H, W, C] or [n, C, H, W] with C 1 or 3, got {shape}; {cure}"
    )


NPZ = Format(partial(_read, (".npz",), NpzFile))
HDF5 = Format(partial(_read, (".h5", ".hdf5"), Hdf5File))
