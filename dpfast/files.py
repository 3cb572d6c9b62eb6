"""Files that are whole or absent, JSON that says what is wrong with it, and locks that a kill lets go of."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpfast.errors import FileError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM)


def is_full(error: OSError) -> bool:
    """Whether there is no room: on the disk, in a quota, below the largest size of a file."""
    return error.errno in _FULL


def write_atomic(path: str | os.PathLike[str], *parts: str | bytes | memoryview) -> None:
    """Replace ``path`` by ``parts``, durably: a reader, or a crash, meets the old file or the new one, whole.

    Raises FileError when it cannot be written (a full disk); the file that was there is intact.
    """
    path = Path(path)
    # One fixed name: what a kill leaves behind is overwritten by the next attempt, and nobody reads it.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        cure = "Change its permissions" if error.errno in _FORBIDDEN else "Choose another folder"
        cure = "Make room" if is_full(error) else cure
        raise FileError(
            f"cannot write {path}: {error.strerror}; the previous file, if any, is intact. {cure}, then run again"
        ) from error


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether it exists. A name that is too long for a file, for which ``Path.exists`` raises OSError, does not."""
    return os.path.exists(path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether it exists and is a file, likewise."""
    return os.path.isfile(path)


def make_folder(folder: Path) -> None:
    """Make the folder, and those above it that are missing, durably. Raises OSError when it cannot be made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)  # before anything is in it: what is there has a durable name, but for the last folder
    if not missing:
        with suppress(PermissionError):  # above a folder of one's own, others may not look
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on stable storage."""
    _sync(folder)


def sync(path: Path) -> None:
    """Put what somebody else wrote on stable storage: a file, or a folder with all it holds. OSError where it fails."""
    for part in (path, *path.rglob("*"), path.parent):
        if not part.is_symlink():
            _sync(part)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """``value`` as strict JSON; infinity becomes the text "inf"."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, cure: str) -> Any:
    """What ``write_json`` wrote. Raises FileError, with ``cure``, when the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}); {cure}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: expected JSON, got {error}; {cure}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def lock(descriptor: int, path: Path) -> bool:
    """Hold the open file at ``path`` until it is closed, be it by SIGKILL; False while another process holds it.

    Raises FileError when its file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise FileError(f"cannot lock {path} ({error.strerror}); use a folder on a local disk") from error
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give every file in ``folder`` the mode that a new file gets, whatever mode it was made with."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
