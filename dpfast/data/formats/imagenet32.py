"""ImageNet at 32x32: ten batches and a validation set, each an npz file or a pickle.

Chrabaszcz, Loshchilov, Hutter, "A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets", 2017.
``data`` is ``[n, 3072]`` in the order of CIFAR; ``labels`` are 1..1000 in the order of ``map_clsloc.txt``, which is not
that of other ImageNets.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dpfast.data.formats.npz import NpzFile
from dpfast.data.formats.pickles import image_batch
from dpfast.data.formats.reading import Chunk, Published, Reading, Split, checked_labels, in_chunks, readable
from dpfast.data.formats.source import Format, Source
from dpfast.errors import DataError

_FILES = {"train": tuple(f"train_data_batch_{i}" for i in range(1, 11)), "val": ("val_data",)}
_MAP = "map_clsloc.txt"
_CLASSES = 1000


def _read(source: Source) -> Reading:
    if not source.path.is_dir():
        raise source.missing(", ".join(_names()))
    # Extracted, each archive is a folder of its own.
    folders = [source.path, *sorted(path for path in source.path.iterdir() if path.is_dir())]
    files = {name: path for name in _names() if (path := _find(folders, name))}
    absent = [name for name in _names() if name not in files]
    if not files or (absent and not source.partial):
        raise source.missing(", ".join(f"{name} or {name}.npz" for name in absent))
    index = _first(folders, _MAP)
    used = [*files.values(), *([index] if index else [])]
    source.add(source.path, [path.relative_to(source.path).as_posix() for path in used])
    splits = {split: [files[name] for name in names if name in files] for split, names in _FILES.items()}
    return Reading(_names_of_classes(index), {name: _split(paths) for name, paths in splits.items() if paths})


def _split(paths: list[Path]) -> Split:
    # Every file is checked here before the first is used: labels and shapes of npz files, pickles whole.
    count = sum(_reader(path)(path).count for path in paths)
    return Split(count, partial(_chunks, paths))


def _chunks(paths: list[Path]) -> Iterator[Chunk]:
    for path in paths:
        yield from _reader(path)(path).chunks()


def _reader(path: Path) -> Callable[[Path], Split]:
    return _npz if path.suffix == ".npz" else _pickle


def _pickle(path: Path) -> Split:
    with readable(str(path)):
        content = path.read_bytes()
    images, labels = image_batch(content, str(path), labels="labels", classes=_CLASSES, first=1)
    return Split(len(labels), partial(in_chunks, images, labels))


def _npz(path: Path) -> Split:
    file = NpzFile(path)
    shape, dtype = file.header("data")
    labels = checked_labels(file.load("labels"), _CLASSES, str(path), first=1)
    if dtype != np.uint8 or shape != (len(labels), 3072):
        raise DataError(
            f"{path}: data must be uint8 [{len(labels)}, 3072], one row per label, got {dtype} {shape}; "
            "get the file again"
        )
    return Split(len(labels), partial(_npz_chunks, file, labels))


def _npz_chunks(file: NpzFile, labels: np.ndarray) -> Iterator[Chunk]:
    for rows, part in file.chunks("data", labels):
        yield rows.reshape(-1, 3, 32, 32), part


def _names_of_classes(index: Path | None) -> tuple[str, ...]:
    """WordNet ids, where the file is there that tells them ("n02119789 1 kit_fox"); "1" to "1000" otherwise."""
    if index is None:
        return tuple(str(i + 1) for i in range(_CLASSES))
    with readable(str(index)):
        rows = [line.split() for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = {int(row[1]): row[0] for row in rows}
    if sorted(names) != list(range(1, _CLASSES + 1)) or len(set(names.values())) != _CLASSES:
        raise DataError(
            f"{index}: expected a WordNet id for each of 1..{_CLASSES}, got {len(names)}; get it again or remove it"
        )
    return tuple(names[i + 1] for i in range(_CLASSES))


def _names() -> list[str]:
    return [name for names in _FILES.values() for name in names]


def _find(folders: list[Path], name: str) -> Path | None:
    return _first(folders, f"{name}.npz") or _first(folders, name)


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


IMAGENET32 = Format(
    _read,
    Published(
        "Downsampled ImageNet (32x32)",
        "https://image-net.org/download-images.php",
        "train_data_batch_1 to train_data_batch_10 and val_data, pickles or .npz",
        {"train": 1_281_167, "val": 50_000},
        (3, 32, 32),
        _CLASSES,
        terms="for research and education only, after registration",
    ),
)
