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


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one ``CaptureError`` that lists all ``problems``; return if there are none."""
    if problems:
        raise refusal(problems)


def refusal(problems: Sequence[Problem]) -> CaptureError:
    """One error that says each thing once: a problem with the names of all it concerns, a cure under all it cures."""
    told: dict[str, dict[str, list[str]]] = {}  # by cure and problem: names
    for problem in problems:
        told.setdefault(problem.cure, {}).setdefault(problem.what, []).extend(problem.names)
    lines = []
    for cure, names_of in told.items():
        for what, names in names_of.items():
            lines.append(f"  - {listed(dict.fromkeys(names))}: {what}" if names else f"  - {what}")
        lines.append(f"    cure: {cure}")
    count = sum(map(len, told.values()))
    return CaptureError(
        f"this step cannot be clipped per example ({count} problem{'s' if count > 1 else ''}); nothing was written to"
        " any p.grad\n" + "\n".join(lines)
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names joined for a message, the tail counted instead of printed."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
