"""Where a data set lies, and a record of every file that is read of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpfast.data.formats.reading import Published, Reading
from dpfast.errors import DataError, FileError

_BLOCK = 1 << 18  # bytes


class Source:
    """A file or folder that is only ever read.

    size: the side that the images are to get, None for their own. published: what is known of the data set, None for
    one's own. partial: it is not all there, so that nothing is compared with what was published.
    """

    def __init__(
        self, path: Path, *, published: Published | None = None, size: int | None = None, partial: bool = False
    ) -> None:
        self.path = path
        self.published = published
        self.size = size
        self.partial = partial
        self._files: list[dict[str, Any]] = []
        self._folders: dict[str, _Folder] = {}

    def add(self, root: Path, names: Iterable[str]) -> None:
        """Record files of ``root``. Raises FileError for all whose MD5 is not the published one, or unreadable."""
        expected = self.published.md5 if self.published and not self.partial else {}
        wrong = []
        for name in names:
            size, sha256, md5 = _sums(root / name)
            self._files.append({"file": name, "bytes": size, "sha256": sha256})
            if expected.get(Path(name).name, md5) != md5:
                wrong.append(f"  - {root / name}: expected MD5 {expected[Path(name).name]}, got {md5}")
        if wrong and self.published:
            raise FileError(
                f"not as {self.published.title} was published:\n"
                + "\n".join(wrong)
                + f"\nget these files again from {self.published.url}, or, if they differ on purpose, say that it is "
                "a part (partial=True, --partial)"
            )

    def image(self, root: Path, name: str, *, folder: str) -> bytes:
        """The bytes of one of the many files of ``folder``, which has one entry in the record."""
        try:
            content = (root / name).read_bytes()
        except OSError as error:
            raise FileError(f"{root / name} cannot be read ({error.strerror}); get it again") from error
        self._folders.setdefault(folder, _Folder()).add(name, content)
        return content

    def record(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each file; of a folder of images: their number, bytes and one sha256."""
        return self._files + [folder.entry(name) for name, folder in self._folders.items()]

    def missing(self, wanted: str) -> DataError:
        """The error for a source without ``wanted``: what to place there, and where to get it."""
        if self.published is None:
            return DataError(f"{self.path}: expected {wanted}, found none; give the folder or file that holds it")
        terms = f" ({self.published.terms})" if self.published.terms else ""
        return DataError(
            f"{self.published.title} is not in {self.path}: expected {wanted}, found none; get it from "
            f"{self.published.url}{terms} and place there {self.published.files}. dpfast downloads nothing"
        )


@dataclass(frozen=True)
class Format:
    """How a data set is read. size: the side that its images get unless another is asked for, None for their own."""

    read: Callable[[Source], Reading]
    published: Published | None = None
    size: int | None = None


class _Folder:
    """The sha256 is over lines "sha256, two spaces, name" in the order of reading, as sha256sum writes them."""

    def __init__(self) -> None:
        self._lines = hashlib.sha256()
        self._files = self._bytes = 0

    def add(self, name: str, content: bytes) -> None:
        self._lines.update(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        self._files += 1
        self._bytes += len(content)

    def entry(self, name: str) -> dict[str, Any]:
        return {"folder": name, "files": self._files, "bytes": self._bytes, "sha256": self._lines.hexdigest()}


def _sums(path: Path) -> tuple[int, str, str]:
    """(bytes, sha256, MD5) of a file."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                sha256.update(block)
                md5.update(block)
                size += len(block)
    except OSError as error:
        raise FileError(
            f"{path} cannot be read ({error.strerror}); check that it is a file and its permissions"
        ) from error
    return size, sha256.hexdigest(), md5.hexdigest()
