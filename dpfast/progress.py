"""How long work tells how far it is; the command line turns the calls into a bar."""

from typing import Protocol


class Progress(Protocol):
    """Called as ``progress(step, total, message)`` after each of ``total`` pieces; raising stops the work."""

    def __call__(self, step: int, total: int, message: str, /) -> None: ...


def silent(step: int, total: int, message: str, /) -> None:
    """The progress callback that says nothing."""
