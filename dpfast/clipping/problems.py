"""What a model does that cannot be clipped per example: collected, then refused in one message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpfast.errors import CaptureError


@dataclass(frozen=True)
class Problem:
    """One reason to refuse, with the names of the parameters it concerns and the cure."""

    names: tuple[str, ...]
    what: str
    cure: str

    def __str__(self) -> str:
        subject = f"{', '.join(self.names)}: " if self.names else ""
        return f"  - {subject}{self.what}\n    cure: {self.cure}"


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one ``CaptureError`` that lists all ``problems``; return if there are none."""
    if problems:
        raise refusal(problems)


def refusal(problems: Sequence[Problem]) -> CaptureError:
    """One error that lists every problem once."""
    unique = list(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    return CaptureError(
        f"this step cannot be clipped per example ({count}); nothing was written to any p.grad\n"
        + "\n".join(map(str, unique))
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names joined for a message, the tail counted instead of printed."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
