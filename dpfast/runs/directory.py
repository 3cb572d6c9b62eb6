"""The folder of one run: where everything lies, one process at a time, files that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpfast.errors import RunLocked


class RunDirectory:
    """``runs/<name>/``: ``recipe.toml``, ``lock``, ``state/``, ``internal/``, and what may leave the house.

    The last is ``release/``, or ``not-private/`` for a run without noise, so that the name of a folder never
    promises what the training did not keep.
    """

    def __init__(self, root: Path, *, private: bool = True) -> None:
        self.root = root
        self.recipe = root / "recipe.toml"
        self.state = root / "state"
        self.internal = root / "internal"
        self.release = root / ("release" if private else "not-private")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the operating system lets go of it even after SIGKILL.

        Raises:
            RunLocked: another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, self.root)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        raise RunLocked(
            f"{root} is in use by process {owner}: expected one process per run;"
            " wait for it or stop it, or start another run with --name"
        ) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` at once: a reader, or a crash, meets the old file or the new one."""
    from dpfast.checkpoint import atomic_write  # imports torch

    atomic_write(path, content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """``value`` as strict JSON; infinity becomes the text "inf"."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
