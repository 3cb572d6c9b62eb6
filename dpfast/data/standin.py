"""Stand-ins: small generated data sets in the files of published ones, to try a recipe before the data are there."""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpfast.errors import ConfigError, DataError

_SUPERSAMPLED = 2  # pixels are means of so many squared


def draw(labels: np.ndarray, *, size: int, channels: int, seed: int) -> np.ndarray:
    """uint8 ``[n, channels, size, size]``: a class is a shape (of five) with or without stripes; place, size, turn,
    colors and grain vary.
    """
    random = np.random.default_rng(seed)
    return np.stack([_image(int(label), size, channels, random) for label in labels])


def _image(label: int, size: int, channels: int, random: np.random.Generator) -> np.ndarray:
    fine = size * _SUPERSAMPLED
    y, x = (np.mgrid[:fine, :fine] + 0.5) / fine * 2 - 1
    angle, scale, shift = random.uniform(-0.3, 0.3), random.uniform(0.5, 0.75), random.uniform(-0.15, 0.15, 2)
    u = ((x - shift[0]) * np.cos(angle) + (y - shift[1]) * np.sin(angle)) / scale
    v = ((y - shift[1]) * np.cos(angle) - (x - shift[0]) * np.sin(angle)) / scale
    inside = _SHAPES[label % len(_SHAPES)](u, v)
    if label // len(_SHAPES) % 2:
        inside = inside & (np.sin(9 * u) > 0)
    sheet = inside.reshape(size, _SUPERSAMPLED, size, _SUPERSAMPLED).mean((1, 3))
    back, front = random.uniform(0, 90, channels), random.uniform(150, 255, channels)
    pixels = back[:, None, None] + (front - back)[:, None, None] * sheet + random.normal(0, 6, (channels, size, size))
    return pixels.clip(0, 255).round().astype(np.uint8)


_SHAPES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: u**2 + v**2 < 1,
    lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,
    lambda u, v: (abs(u) < 0.3) | (abs(v) < 0.3),
    lambda u, v: (v < 0.7) & (abs(u) < (v + 1) * 0.6),
    lambda u, v: abs(u**2 + v**2 - 0.65) < 0.3,
)


def write_stand_in(name: str, folder: Path, *, train: int = 2000, test: int = 500, seed: int = 0) -> None:
    """Files of the data set ``name`` in an empty ``folder``, as published, with so many generated images.

    Raises:
        ConfigError: a data set of which there is no stand-in.
        DataError: the folder is not empty.
    """
    if name not in STAND_INS:
        raise ConfigError(f"no stand-in of {name!r}: expected one of {', '.join(STAND_INS)}")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: a stand-in among real files would be taken for them; give another")
    STAND_INS[name](folder, train, test, seed)


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _labels(count: int, classes: int) -> np.ndarray:
    return np.arange(count) % classes


def _mnist(folder: Path, train: int, test: int, seed: int) -> None:
    for number, (split, count) in enumerate((("train", train), ("t10k", test))):
        labels = _labels(count, 10)
        images = draw(labels, size=28, channels=1, seed=seed + number)
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = gzip.compress(header + array.tobytes(), mtime=0)
            _write(folder / f"{split}-{kind}-ubyte.gz", content)


def _cifar10(folder: Path, train: int, test: int, seed: int) -> None:
    inner = folder / "cifar-10-batches-py"
    batches = {f"data_batch_{i + 1}": part for i, part in enumerate(np.array_split(_labels(train, 10), 5))}
    for number, (name, labels) in enumerate({**batches, "test_batch": _labels(test, 10)}.items()):
        data = draw(labels, size=32, channels=3, seed=seed + number).reshape(len(labels), -1)
        _write(inner / name, pickle.dumps({b"data": data, b"labels": labels.tolist()}, protocol=2))
    names = [f"shape {i}" for i in range(10)]
    _write(inner / "batches.meta", pickle.dumps({"label_names": names}, protocol=2))


def _imagenet32(folder: Path, train: int, test: int, seed: int) -> None:
    """Of ten of the thousand classes."""
    for number, (name, count) in enumerate((("train_data_batch_1", train), ("val_data", test))):
        labels = _labels(count, 10)
        data = draw(labels, size=32, channels=3, seed=seed + 100 + number).reshape(count, -1)
        file = io.BytesIO()
        np.savez(file, data=data, labels=labels + 1)
        _write(folder / f"{name}.npz", file.getvalue())


def _camelyon17(folder: Path, train: int, test: int, seed: int) -> None:
    """A patch with a ring or without one, from a hospital to train on and from the one of the test."""
    from dpfast.data.pictures import encode

    rows = ["patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for number, (center, patient, count) in enumerate(((0, 4, train), (2, 40, test))):
        labels = _labels(count, 2)
        slide = f"patient_{patient:03}_node_0"
        for i, image in enumerate(draw(4 * labels, size=96, channels=3, seed=seed + 200 + number)):
            rows.append(f"{patient:03},0,{96 * i},0,{labels[i]},{number},{center},0")
            _write(folder / f"patches/{slide}/patch_{slide}_x_{96 * i}_y_0.png", encode(image))
    _write(folder / "metadata.csv", "\n".join(rows) + "\n")


STAND_INS: dict[str, Callable[[Path, int, int, int], None]] = {
    "camelyon17": _camelyon17,
    "cifar10": _cifar10,
    "imagenet32": _imagenet32,
    "mnist": _mnist,
}
