"""Stages of a run: each done once per recipe, resumed after a kill, never silently paid for twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpfast.errors import ConfigError, FileError, LedgerError
from dpfast.files import is_full, make_folder, remove, sync, write_json
from dpfast.privacy.ledger import read_ledger
from dpfast.progress import Progress

HEARTBEAT = 2.0  # seconds of work that a kill may leave out of the recorded time


class Stage:
    """One stage, remembered in ``folder/stage.json`` with the recipe parts that it depends on.

    parts: recipe values and fingerprints; the stage is redone when one of them changes.
    defaults: of the parts whose keys may be newer than a record. Its version did what the default says, so one that it
        lacks and that is at its default is no change. Only of tables that are recorded whole: of another a key may be
        lacking that there was, whatever its value.
    title: its name for readers. act: ``(run, progress) -> None`` does the work.
    shared: whether all ranks act, as a collective; rank 0 does it alone where not.
    outputs: what it leaves behind, the main thing first; the stage is redone when one of them is missing.
    ledger: set for a stage that spends privacy budget. Once it holds a step the parts can no longer
        change: redoing the stage would spend again, and the released epsilon would be a lie.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        parts: dict[str, Any],
        *,
        title: str,
        act: Callable[..., None],
        outputs: Sequence[Path],
        defaults: Mapping[str, Any] | None = None,
        ledger: Path | None = None,
        shared: bool = False,
    ) -> None:
        self.name = name
        self.shared = shared
        self.title = title
        self.act = act
        self.folder = folder
        self.outputs = tuple(outputs)
        self.ledger = ledger
        self._record = folder / "stage.json"
        self._defaults = defaults or {}
        known, new = self._read().get("parts") or parts, self._defaults.items()
        # As the record has them, which keeps the fingerprint that its checkpoints carry.
        self.parts = {key: value for key, value in parts.items() if key in known or (key, value) not in new}
        self._started = self._beat = 0.0
        self._before = 0.0

    def check(self) -> None:
        """Refuse a changed recipe where the budget was already touched.

        Raises:
            ConfigError: naming every changed key with its old and new value.
        """
        changes = self._changes()
        if changes and self.has_spent():
            raise ConfigError(
                f"this run has already spent privacy budget in its stage {self.name!r}, with other values:\n"
                + "\n".join(f"  - {change}" for change in changes)
                + "\nput them back, or start a new run with --name (a second release from the same private"
                " images adds its epsilon to the first)"
            )

    def has_spent(self) -> bool:
        """Whether a step or another release was charged, or may have been: an unreadable ledger counts as spent."""
        if self.ledger is None or not self.ledger.exists() or b"\n" not in self.ledger.read_bytes():
            return False
        try:
            found = read_ledger(self.ledger)
            return found.charged_steps + found.draws > 0
        except LedgerError:
            return True

    def done(self) -> bool:
        """Whether it was finished with these very parts and its outputs are still there."""
        record = self._read()
        return (
            bool(record.get("done"))
            and record.get("parts") == self.parts
            and all(path.exists() for path in self.outputs)
        )

    def begun(self) -> bool:
        """Whether an earlier attempt with these very parts was interrupted."""
        record = self._read()
        return bool(record) and not record.get("done") and record.get("parts") == self.parts

    @property
    def seconds(self) -> float:
        """Time spent on it so far, over all resumes."""
        return float(self._read().get("seconds", 0.0))

    @contextmanager
    def working(self, progress: Progress) -> Iterator[Progress]:
        """Record that the stage is under way, and on leaving without an error that it is done, its outputs being on
        stable storage.

        Gives the progress callback to work with: it passes calls on and keeps the recorded time current, so
        that a kill loses at most ``HEARTBEAT`` seconds of it. Raises FileError when the disk is full, or a file
        cannot be used for another reason of the operating system's.
        """
        self.check()
        try:
            if self._changes() and not self.has_spent():
                for path in (self.folder, *self.outputs):
                    remove(path)
            make_folder(self.folder)
        except OSError as error:
            raise self._stopped(error) from error
        self._before, self._started = self.seconds, time.monotonic()
        self._write(done=False)

        def beat(step: int, total: int, message: str, /) -> None:
            if time.monotonic() - self._beat > HEARTBEAT:
                self._write(done=False)
            progress(step, total, message)

        try:
            yield beat
            for path in filter(Path.exists, self.outputs):
                sync(path)
        except OSError as error:
            raise self._stopped(error) from error
        except BaseException:
            self._write(done=False)
            raise
        self._write(done=True)

    def _stopped(self, error: OSError) -> FileError:
        cure = "make room, then run again" if is_full(error) else "run again when that is mended"
        return FileError(f"stage {self.name!r} stopped: {error}; {cure}")

    def _write(self, *, done: bool) -> None:
        self._beat = time.monotonic()
        seconds = self._before + self._beat - self._started
        write_json(self._record, {"done": done, "seconds": round(seconds, 3), "parts": self.parts})

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_text())
        except (OSError, ValueError):  # never begun, or damaged: begin again
            return {}
        return record if isinstance(record, dict) else {}

    def _changes(self) -> list[str]:
        old = self._read().get("parts", {})
        if not old:
            return [f"what they were is unknown: {self._record} is missing or damaged, restore it"]
        keys = [*old, *(key for key in self.parts if key not in old)]
        return [
            f"{key} was {old.get(key, self._defaults.get(key))!r}, is now {self.parts.get(key)!r}"
            for key in keys
            if old.get(key) != self.parts.get(key)
        ]
