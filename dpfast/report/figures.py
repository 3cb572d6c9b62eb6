"""Pictures for the reports: strips of samples as PNG, curves as inline SVG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

INK, MUTED, ACCENT, GRID = "#16232e", "#5b6b78", "#0b6e75", "#e3e9ee"


def strip(images: Tensor, *, gap: int = 1) -> bytes:
    """One row of images as PNG. images: uint8 ``[n, C, H, W]`` with C of 1 or 3."""
    return _png(_row(images, gap))


def contact_sheet(rows: Sequence[Tensor], *, scale: int = 1, gap: int = 1) -> bytes:
    """Rows of images, one below the other, as PNG; each pixel becomes ``scale x scale``.

    rows: uint8 ``[n, C, H, W]`` each, of one C, H and W; shorter rows end in white.
    """
    lines = [_row(images, gap) for images in rows]
    width = max(line.shape[1] for line in lines)
    padded = [_pad(line, width, gap if i + 1 < len(lines) else 0) for i, line in enumerate(lines)]
    sheet = np.concatenate(padded)
    return _png(sheet.repeat(scale, 0).repeat(scale, 1))


def _row(images: Tensor, gap: int) -> np.ndarray:
    tiles = images.permute(0, 2, 3, 1).cpu().numpy()
    _, height, _, channels = tiles.shape
    white = np.full((height, gap, channels), 255, np.uint8)
    pieces = [piece for tile in tiles for piece in (tile, white)]
    return np.concatenate(pieces[:-1], axis=1)


def _pad(line: np.ndarray, width: int, below: int) -> np.ndarray:
    return np.pad(line, ((0, below), (0, width - line.shape[1]), (0, 0)), constant_values=255)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the value of ``src``."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def curve(
    x: Sequence[float],
    y: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    smooth: int = 1,
    level: tuple[float, str] | None = None,
) -> str:
    """A line as inline SVG, read aloud as ``label``.

    smooth: width of a running mean, drawn over the faint raw line. level: a dashed line above it and its name.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.ticker import MaxNLocator

    with context({"svg.fonttype": "none", "svg.hashsalt": "dpfast", "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        if smooth > 1 and len(y) > 2 * smooth:
            axes.plot(x, y, color=ACCENT, linewidth=0.7, alpha=0.25)
            y = np.convolve(y, np.ones(smooth) / smooth, mode="valid").tolist()
            x = x[smooth - 1 :]
        axes.plot(x, y, color=ACCENT, linewidth=2, solid_capstyle="round")
        if level is not None:
            axes.axhline(level[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(level[1], (x[0], level[0]), (2, 4), textcoords="offset points", color=MUTED)
            axes.set_ylim(top=1.15 * level[0])  # room for its name above it, clear of the curve
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        plain(axes)
        return _svg(figure, label)


def plain(axes: object) -> None:
    """No frame, faint lines behind the data, words in grey."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", color=GRID, labelcolor=MUTED, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.margins(x=0.01)


def _svg(figure: object, label: str) -> str:
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    return text.replace('role="img">', f'role="img" aria-label="{label}">', 1)
