"""Figures from results: time and memory of a private step relative to the non-private one, as one thing grows."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import SWEEP_TAG, SWEEPS, WIDTHS, Row
from dpfast.report.figures import ACCENT, INK, MUTED, plain

LOOKS = {  # colour, marker, width
    "dpfast": (ACCENT, "o", 2.4),
    "example at a time": ("#c8692b", "s", 1.4),
    "vmap": ("#7a5aa8", "^", 1.4),
    "Opacus hooks": ("#6f7f8c", "D", 1.4),
}
QUANTITIES = {"time": "time / non-private", "memory": "peak memory / non-private"}
FINE = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)
COARSE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
Size = Callable[[Row], int]
Results = dict[tuple[str, str], dict[str, Any]]
PANELS: dict[str, tuple[Size, str]] = {
    "rows": (lambda row: row.examples * row.augmult, "rows B * K, growing by B and K in turns"),
    "examples": (lambda row: row.examples, "examples B, K = 1"),
    "augmult": (lambda row: row.augmult, "augmentations K, B = 4"),
    "width": (lambda row: WIDTHS[row.model], "channels, B = K = 4"),
}
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")
STYLE = {"font.family": "sans-serif", "font.size": 10.5, "text.color": INK}


def write(rows: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """``step-rows.png`` and ``step-sweep.png``, from the newest result of each contestant in each row."""
    newest = {(r["row"], r["contestant"]): r for r in rows if r.get("tag") == SWEEP_TAG and "skipped" not in r}
    if not newest:
        raise SystemExit("No results to draw: run python -m benchmarks.step --sweep")
    figures = {"step-rows": ("rows",), "step-sweep": ("examples", "augmult", "width")}
    paths = [folder / f"{name}.png" for name in figures]
    with context(STYLE):
        for path, panels in zip(paths, figures.values(), strict=True):
            drawn(newest, panels).savefig(path, dpi=150, metadata={"Software": None})
    return paths


def drawn(newest: Results, panels: Sequence[str]) -> Figure:
    """Both quantities side by side for one panel, one above the other for several."""
    many = len(panels) > 1
    shape = (len(QUANTITIES), len(panels)) if many else (1, len(QUANTITIES))
    figure = Figure(figsize=(4.2 * shape[1], 0.6 + 3 * shape[0]), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.subplots(*shape, squeeze=False, sharey="row" if many else False)
    places = [(panel, quantity) for quantity in QUANTITIES for panel in panels]
    for axes, (panel, quantity) in zip(grid.flat, places, strict=True):
        draw(axes, newest, panel, quantity)
        axes.set_ylabel(QUANTITIES[quantity] if panel == panels[0] else "")
    for axes in grid.flat:
        label_ratios(axes)
    handles = [Line2D([], [], color=c, marker=m, linewidth=w, label=name) for name, (c, m, w) in LOOKS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    return figure


def draw(axes: Axes, newest: Results, panel: str, quantity: str) -> None:
    """One line for each contestant, over a line at 1; both axes logarithmic."""
    size, label = PANELS[panel]
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for name, (colour, marker, width) in reversed(LOOKS.items()):  # ours on top
        found = [(size(row), newest.get((row.name, name))) for row in SWEEPS[panel]]
        points = [(x, result[quantity]) for x, result in found if result]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({size(row) for row in SWEEPS[panel]})
    axes.xaxis.set(major_locator=FixedLocator(sizes), major_formatter=PLAIN_NUMBER, minor_locator=NullLocator())
    axes.set_xlabel(label)
    plain(axes)
    axes.margins(x=0.04, y=0.08)


def label_ratios(axes: Axes) -> None:
    """As many numbers as there is room for, once all lines that share the axis are drawn."""
    low, high = axes.get_ylim()
    ticks = FINE if high / low < 10 else COARSE
    axes.yaxis.set(major_locator=FixedLocator(ticks), major_formatter=PLAIN_NUMBER, minor_locator=NullLocator())
    axes.set_ylim(low, high)
