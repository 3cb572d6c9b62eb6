"""A few named files in a folder, or in a tar archive that is never extracted: nothing of it becomes a path."""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from dpfast.data.formats.reading import readable
from dpfast.errors import FileError


class Package:
    """The files of a folder, or of the one folder in a tar archive (compressed or not), each read whole.

    Raises FileError for an archive that is truncated, or that has members which lead out of it (absolute paths, "..",
    links, devices).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_archive = path.is_file()
        self._members = _members(path) if self.is_archive else {f.name: f.name for f in path.iterdir() if f.is_file()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def where(self, name: str) -> str:
        """The file as errors name it."""
        return f"{self.path}/{name}" if not self.is_archive else f"{self.path} ({name})"

    def read(self, name: str) -> bytes:
        """Raises FileError if the file cannot be read."""
        with readable(self.where(name)):
            if not self.is_archive:
                return (self.path / name).read_bytes()
            with tarfile.open(self.path) as archive:
                member = archive.extractfile(self._members[name])
                assert member is not None  # only regular files are listed
                return member.read()


def packages(path: Path, names: Iterable[str]) -> Iterator[Package]:
    """``path`` itself, a folder or an archive, and then those of its entries ``names`` that exist."""
    yield Package(path)
    if path.is_dir():
        yield from (Package(path / name) for name in names if (path / name).exists())


def _members(path: Path) -> dict[str, str]:
    """Name in its folder -> name in the archive, of every regular file."""
    with readable(str(path)), tarfile.open(path) as archive:
        members = archive.getmembers()
    for member in members:
        if (
            member.name.startswith("/")
            or ".." in PurePosixPath(member.name).parts
            or not (member.isfile() or member.isdir())
        ):
            raise FileError(
                f"{path}: member {member.name!r} leads out of the archive; expected plain files in one folder. Nothing "
                "was extracted: do not use this archive, and get it again from where the data set is published"
            )
    return {PurePosixPath(member.name).name: member.name for member in members if member.isfile()}
