"""How long work tells how far it is, and how times are written; the command line turns the calls into a bar."""

from typing import Protocol


class Progress(Protocol):
    """Called as ``progress(step, total, message)`` after each of ``total`` pieces; raising stops the work."""

    def __call__(self, step: int, total: int, message: str, /) -> None: ...


def silent(step: int, total: int, message: str, /) -> None:
    """The progress callback that says nothing."""


def duration(seconds: float) -> str:
    """``75 -> "1 min 15 s"``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 100 else f"{hours // 24:,} days"


def coarse_duration(seconds: float) -> str:
    """``75 -> "about 1 minute"``: as much as may be told of training on private images."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return "under a minute"
    if minutes < 90:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {round(minutes / 60)} hours"
