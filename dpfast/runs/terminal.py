"""Progress as a bar with the time left; where no terminal is attached, as a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

from dpfast.progress import duration

INTERVAL = 10.0  # seconds between lines where no terminal is attached


class TerminalProgress:
    """A ``dpfast.progress.Progress`` for one stage at a time. It shows steps and time, never a loss of its own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._stage = ""
        self._resumed = False
        self._total = self._step = self._first = 0
        self._started = self._last = 0.0
        self._bar: Any = None

    def stage(self, name: str, *, resumed: bool = False) -> None:
        """Begin a stage: the clock for its time left starts at its first call. A resumed one says where it is."""
        self.close()
        self._stage, self._resumed = name, resumed

    def say(self, text: str) -> None:
        """One line of its own, clear of any bar."""
        self.close()
        print(text, file=self.stream, flush=True)

    def __call__(self, step: int, total: int, message: str, /) -> None:
        now = time.monotonic()
        if total != self._total or step < self._step:
            self.close()
            self._total, self._first, self._started, self._last = total, step, now, now
            if self._resumed:
                print(f"  going on from {step}/{total}: {message}", file=self.stream, flush=True)
                self._resumed = False
        self._step = step
        label = message or self._stage
        if self.stream.isatty():
            self._show(label)
        elif now - self._last >= INTERVAL:
            self._last = now
            print(self._line(label, now), file=self.stream, flush=True)
        if step >= total:
            self.close()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._total = self._step = 0

    def _show(self, label: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            # What tqdm finds out by itself is 0 by 0 on some pseudo-terminals, and then it draws nothing.
            columns, lines = shutil.get_terminal_size()
            self._bar = tqdm(
                total=self._total,
                initial=self._first,
                file=self.stream,
                leave=False,
                ncols=min(100, columns),
                nrows=lines,
            )
        self._bar.set_description_str(label, refresh=False)
        self._bar.update(self._step - self._bar.n)

    def _line(self, label: str, now: float) -> str:
        taken = self._step - self._first
        left = ""
        if taken > 0:
            left = f", about {duration((now - self._started) / taken * (self._total - self._step))} left"
        return f"  {label} {self._step}/{self._total}{left}"
