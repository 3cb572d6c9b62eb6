"""Samples as folders of PNG files, one for each class: what labeling tools and other libraries open."""

import re
from pathlib import Path

from dpfast.data.pictures import encode
from dpfast.data.shards import MANIFEST, ShardFolder, claim, open_shards
from dpfast.errors import DataError
from dpfast.files import write_atomic
from dpfast.progress import Progress, silent

STATEMENT = ("PRIVACY.md", "privacy.json")


def write_class_folders(samples: str | Path, folder: str | Path, *, progress: Progress = silent) -> int:
    """Every image of a folder of shards as ``<folder>/<class>/<number>.png``, with their privacy statement beside.

    Images that are there are not written again, and no more than a shard is in memory. Returns the number of images.

    Raises:
        DataError: the samples are incomplete or without a statement, two classes would share a folder, or there is
            something else in it.
    """
    samples, folder = Path(samples), Path(folder)
    shards = open_shards(samples)
    names = _folder_names(shards)
    statement = {name: _statement(samples / name) for name in STATEMENT}
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise DataError(f"{folder} is not empty, and not of an earlier export: give another folder")
    claim(folder, shards.settings)
    for name, content in statement.items():
        write_atomic(folder / name, content)
    done = 0
    for number, labels in shards:
        for image, label in zip(shards.images(number, labels), labels.tolist(), strict=True):
            path = folder / names[label] / f"{done:07d}.png"
            if not path.exists():
                _write(path, encode(image.numpy()))
            done += 1
        progress(done, len(shards.labels), "writing images")
    return done


def _statement(path: Path) -> bytes:
    if not path.exists():
        raise DataError(f"{path} is missing: samples leave with what they promise; make them by a run")
    return path.read_bytes()


def _folder_names(shards: ShardFolder) -> list[str]:
    """Of classes, without what file systems refuse."""
    names = [re.sub(r"[^\w.-]+", "_", name).strip("._") for name in shards.classes]
    if "" in names or len({name.lower() for name in names}) < len(names):
        raise DataError(f"the classes {list(shards.classes)} would not be told apart as names of folders: rename some")
    return names


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all. Not waiting for the disk, as ``write_atomic`` does: there may be millions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
