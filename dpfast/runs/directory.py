"""The folder of one run: where everything lies, what of it may leave, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpfast.errors import FileError, RunLocked
from dpfast.files import lock, make_folder, write_atomic

MARKER = "DO_NOT_RELEASE.txt"
_MARKED = "This folder holds private images, or what was computed from them without protection: keep it in the house.\n"


class RunDirectory:
    """``runs/<name>/``: ``recipe.toml``, ``lock``, ``state/``, ``internal/``, and what may leave the house.

    The last is ``release/``, or ``not-private/`` for a run without noise, so that the name of a folder never
    promises what the training did not keep. In every other folder a file says that it must stay.
    """

    def __init__(self, root: Path, *, private: bool = True) -> None:
        self.root = root
        self.recipe = root / "recipe.toml"
        self.state = root / "state"
        self.internal = root / "internal"
        self.release = root / ("release" if private else "not-private")
        self._must_stay = [self.state, self.internal, *([] if private else [self.release])]

        self.public_model = self.state / "pretrain" / "model"
        self.losses = self.state / "pretrain" / "losses.json"
        self.training = self.state / "train"
        self.ledger = self.training / "ledger.jsonl"
        self.model = self.release / "model"
        self.samples = self.release / "samples"
        self.public_samples = self.state / "sample" / "public"
        self.baseline = self.internal / "baselines" / "dp_classifier"
        self.baseline_ledger = self.baseline / "ledger.jsonl"
        self.results = self.internal / "results.json"
        self.sweep_samples = self.state / "sweep"
        self.sweep_results = self.internal / "sweep" / "results"
        self.unprotected = self.internal / "sweep" / "unprotected"
        self.sweep = self.internal / "sweep" / "sweep.json"
        self.sweep_report = self.internal / "sweep" / "report.html"
        self.choices = self.internal / "sweep" / "choices.json"
        self.audit = self.internal / "audit" / "audit.json"
        self.audit_report = self.internal / "audit" / "report.html"
        self.metrics = self.internal / "metrics.json"
        self.release_report = self.release / "report.html"
        self.internal_report = self.internal / "report.html"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the operating system lets go of it even after SIGKILL.

        Raises:
            RunLocked: another process holds it.
            FileError: nothing can be written there.
        """
        try:
            make_folder(self.root)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FileError(f"cannot make the run's folder {self.root} ({error.strerror}); name another") from error
        try:
            if not lock(descriptor, self.root):
                raise RunLocked(self._held(descriptor))
            with suppress(OSError):  # a full disk: only for the message of who comes second
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def mark(self) -> None:
        """Write into each folder that must not leave the house that it must not."""
        for folder in self._must_stay:
            write_atomic(folder / MARKER, _MARKED)

    def owner(self) -> str:
        """What the lock says of who holds it, or held it last; nothing where there is no folder."""
        try:
            return (self.root / "lock").read_text().strip()
        except OSError:
            return ""

    def _held(self, descriptor: int) -> str:
        owner = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        return (
            f"{self.root} is in use by process {owner}: expected one process per run;"
            " wait for it or stop it, or start another run with --name"
        )
