"""What commands share: errors and warnings as lines for people, names and values as a table."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from dpfast.errors import DPFastError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors as a few red lines and exit code 2, Ctrl-C as a hint and exit code 130, warnings as one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("\ninterrupted; run the same command to go on", err=True)
            raise typer.Exit(130) from None
        except DPFastError as error:
            if debug:
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None
        except OSError as error:  # a full disk, a folder that is gone: no bug of ours, if seldom foreseen
            if debug:
                raise
            typer.secho(f"error: {error} (--debug shows where)", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None


def table(rows: list[tuple[str, str]]) -> None:
    """Print names and what is said of each."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning | RuntimeWarning):
        typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)
