"""How often to do what is not the training itself: probes that are repeated, checkpoints."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.005  # of the time, that each may take
FREE = 0.25  # seconds that it may take in any case


class Allowance:
    """``SHARE`` of the time since it was granted, and ``FREE`` at once."""

    def __init__(self) -> None:
        self._granted = time.monotonic()
        self._spent = self._last = 0.0

    def is_left(self) -> bool:
        """For one more, if it takes as long as the last."""
        return self._spent + self._last <= max(FREE, SHARE * (time.monotonic() - self._granted))

    @contextmanager
    def spending(self) -> Iterator[None]:
        """For what it is granted for."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._last = time.monotonic() - begin
            self._spent += self._last


class Pace:
    """Of the probes of one model or objective: repeated after 1, 2, 4, 8, ... changes, or as soon after that as their
    allowance lasts, and where somebody insists.
    """

    def __init__(self) -> None:
        self._changes: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """What comes next is shown for the first time."""
        self._allowance: Allowance | None = None  # for the first time there is none
        self._due = self._stale = self._insisted = False

    def changed(self, what: str) -> None:
        """Once more. What is due now is so until it is taken."""
        self._stale = True
        self._changes[what] += 1
        self._due |= self._changes[what] & (self._changes[what] - 1) == 0

    def insist(self) -> None:
        """Whatever has changed since the last time is due, and for nothing."""
        self._due = self._insisted = self._stale

    def take(self) -> bool:
        """Whether to repeat the probes now."""
        if not self._due:
            return False
        if self._allowance is None:
            self._allowance = Allowance()
        self._due = not (self._insisted or self._allowance.is_left())
        if not self._due:
            self._stale = self._insisted = False
        return not self._due

    @contextmanager
    def spending(self, *, repeated: bool) -> Iterator[None]:
        """For the time that a probe takes; what was not shown before is free."""
        if self._allowance is None or not repeated:
            yield
        else:
            with self._allowance.spending():
                yield
