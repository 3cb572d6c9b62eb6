"""The folder of one run: where everything lies, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpfast.errors import RunLocked
from dpfast.files import lock


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
            if not lock(descriptor, self.root):
                raise RunLocked(self._held(descriptor))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _held(self, descriptor: int) -> str:
        owner = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        return (
            f"{self.root} is in use by process {owner}: expected one process per run;"
            " wait for it or stop it, or start another run with --name"
        )
