"""The figures of a study as PNG: FID by epsilon, accuracy by number of synthetic images, transfer of ranks.

After figures 2, 3 and 4 of Ghalebikesabi et al. (arXiv 2302.13861). Names stand beside what they name, not in a legend,
and lines differ by marker as well as by colour (the colours, after Okabe and Ito, are told apart by the colour-blind).
They are drawn from figures that were measured on private images without protection, and are as private as these.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from dpfast.evaluation.studies import CountAccuracy, RankTransfer
from dpfast.report.figures import ACCENT, GRID, INK, MUTED, plain

_COLORS = (ACCENT, "#b8500f", "#7a4a9e", "#3b6fb6")
_MARKERS = ("o", "s", "^", "D")
_STYLE = {"font.family": "sans-serif", "font.size": 11, "axes.titlesize": 11}
_DPI = 160
_LABEL_GAP = 0.07  # between two names at the right, in heights of the axes


def fid_by_epsilon(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, levels: Mapping[str, float], delta: float, extractor: str
) -> bytes:
    """FID over epsilon, both as measured (figure 2).

    curves: by name, (epsilon, FID) pairs; epsilons are finite and above 0. levels: FIDs by name that have no epsilon,
    such as "public only" and "no noise". extractor: the name that the scores carry.
    """
    from matplotlib.style import context

    with context(_STYLE):
        figure, axes = _axes(f"ε at δ = {delta:g} (logarithmic)", f"FID ({extractor}), lower is closer")
        names = []
        for (name, points), color, marker in zip(curves.items(), cycle(_COLORS), cycle(_MARKERS)):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, color=color, marker=marker, linewidth=2, markersize=6)
            names.append((y[-1], name, color))
        names += _levels(axes, levels, "{:.1f}")
        axes.set_ylim(bottom=0)
        _log_ticks(axes, {epsilon for points in curves.values() for epsilon, _ in points})
        _name_at_the_right(axes, names)
        return _png(figure)


def accuracy_by_count_plot(
    studied: Mapping[str, Sequence[CountAccuracy]], *, levels: Mapping[str, float], ensemble: bool = True
) -> bytes:
    """Accuracy over the number of synthetic images that a classifier was trained on (figure 3).

    studied: results of ``accuracy_by_count`` by name ("ε = 10"); the line is the mean over seeds, the band reaches from
    the worst to the best, and a dashed line is their ensemble. levels: accuracies (0 to 1) by name of what does without
    synthetic images: "real data", "DP-SGD classifier".
    """
    from matplotlib.style import context

    with context(_STYLE):
        figure, axes = _axes("synthetic images trained on (logarithmic)", "accuracy on real test images (%)")
        names = []
        for (name, points), color, marker in zip(studied.items(), cycle(_COLORS), cycle(_MARKERS)):
            points = sorted(points, key=lambda point: point.count)
            x, mean = [point.count for point in points], [100 * point.mean for point in points]
            low, high = ([100 * worst(p.accuracies) for p in points] for worst in (min, max))
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(x, mean, color=color, marker=marker, linewidth=2, markersize=6)
            names.append((mean[-1], name, color))
            if ensemble:
                together = [100 * point.ensemble for point in points]
                axes.plot(x, together, color=color, marker=marker, markerfacecolor="white", linestyle=(0, (4, 2)))
                names.append((together[-1], "ensemble", color))
        names += _levels(axes, {name: 100 * accuracy for name, accuracy in levels.items()}, "{:.1f}%")
        _log_ticks(axes, {point.count for points in studied.values() for point in points})
        _name_at_the_right(axes, names)
        return _png(figure)


def rank_transfer_plot(found: RankTransfer) -> bytes:
    """Accuracy on real over accuracy on held-out synthetic images, a dot for each setting (figure 4); a ring is around
    the one that would be chosen on synthetic images.
    """
    from matplotlib.style import context

    with context(_STYLE):
        figure, axes = _axes("accuracy on held-out synthetic images (%)", "accuracy on real images (%)")
        x, y = ([100 * value for value in values] for values in (found.synthetic, found.real))
        axes.scatter(x, y, color=ACCENT, s=36, alpha=0.8, linewidths=0)
        chosen = max(range(len(x)), key=lambda i: x[i])
        axes.scatter(
            [x[chosen]], [y[chosen]], facecolors="none", edgecolors=INK, s=110, label="chosen on synthetic images"
        )
        axes.legend(loc="lower right", frameon=False, labelcolor=INK, handletextpad=0.2)
        low, high = found.interval
        rho = f"Spearman's \N{GREEK SMALL LETTER RHO} = {found.rho:.2f}"
        axes.set_title(f"{rho} (95% interval {low:.2f} to {high:.2f}), {len(x)} settings", loc="left", color=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.margins(0.08)
        return _png(figure)


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    plain(axes)
    return figure, axes


def _levels(axes: Any, levels: Mapping[str, float], shown: str) -> list[tuple[float, str, str]]:
    """Dashed lines across, and what is to be written beside them."""
    for value in levels.values():
        axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return [(value, f"{name} ({shown.format(value)})", MUTED) for name, value in levels.items()]


def _log_ticks(axes: Any, values: Iterable[float]) -> None:
    """A logarithmic axis whose ticks are what was measured; thousands are "k"."""
    ticks = sorted(values)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.03)


def _name_at_the_right(axes: Any, names: Sequence[tuple[float, str, str]]) -> None:
    """Each (height in data, text, colour) beside the axes, moved apart where they would meet."""
    names = sorted(names)
    low, high = axes.get_ylim()
    heights = _apart([(value - low) / (high - low) for value, _, _ in names])
    for height, (_, text, color) in zip(heights, names, strict=True):
        axes.annotate(text, (1.015, height), xycoords="axes fraction", va="center", color=color, size=10)


def _apart(heights: Sequence[float]) -> Sequence[float]:
    """Sorted heights, moved as little as can be (in squares) until all are ``_LABEL_GAP`` apart: what remains of each
    once the gaps below it are taken away must not fall.
    """
    from scipy.optimize import isotonic_regression

    gaps = _LABEL_GAP * np.arange(len(heights))
    moved: Sequence[float] = (isotonic_regression(np.array(heights) - gaps).x + gaps).tolist()
    return moved


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
