"""Tables for a terminal."""

from collections.abc import Container, Iterable, Iterator, Sequence


def columns(rows: Iterable[Sequence[str]], *, words: Container[int]) -> Iterator[str]:
    """A line for each row: the columns ``words`` to the left, the others, of figures, to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        yield "  ".join(cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in cells).rstrip()
