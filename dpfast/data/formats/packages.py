"""A few named files in a folder, or in a tar archive that is never extracted: nothing of it becomes a path."""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from dpfast.data.formats.reading import readable
from dpfast.errors import FileError

_LARGEST = 1 << 30  # bytes of an archive's files; those of CIFAR have 186 MB


class Package:
    """The files of a folder, read one by one, or of the folder in a tar archive, held in memory.

    A compressed archive can be read from its beginning only: file by file, one of 170 MB takes half a minute. Raises
    FileError for one that is truncated or too large, or has members which lead out of it (absolute paths, "..", links).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_archive = path.is_file()
        self._files: dict[str, Path | bytes]
        if self.is_archive:
            self._files = dict(_contents(path))
        else:
            self._files = {file.name: file for file in path.iterdir() if file.is_file()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def where(self, name: str) -> str:
        """The file as errors name it."""
        return f"{self.path} ({name})" if self.is_archive else f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """Raises FileError if the file cannot be read."""
        file = self._files[name]
        with readable(self.where(name)):
            return file if isinstance(file, bytes) else file.read_bytes()


def packages(path: Path, names: Iterable[str]) -> Iterator[Package]:
    """``path`` itself, a folder or an archive, and then those of its entries ``names`` that exist."""
    yield Package(path)
    if path.is_dir():
        yield from (Package(path / name) for name in names if (path / name).exists())


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name in its folder, content) of every regular file."""
    size = 0
    with readable(str(path)), tarfile.open(path) as archive:
        for member in archive:
            _check_contained(member, path)
            size += member.size
            if size > _LARGEST:
                raise FileError(
                    f"{path}: expected files of at most {_LARGEST:,} bytes in all; give the published archive"
                )
            if (file := archive.extractfile(member)) is not None:
                yield PurePosixPath(member.name).name, file.read()


def _check_contained(member: tarfile.TarInfo, path: Path) -> None:
    steps = PurePosixPath(member.name)
    if steps.is_absolute() or ".." in steps.parts or not (member.isfile() or member.isdir()):
        raise FileError(
            f"{path}: member {member.name!r} leads out of the archive; expected plain files in one folder. Nothing was "
            "extracted: do not use this archive, get it from where it is published"
        )
