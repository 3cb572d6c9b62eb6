"""Public stand-ins for handwritten digits: matplotlib's fonts, warped until they vary somewhat as handwriting does.

Each glyph is kept as a signed distance field (positive inside the stroke), so that one threshold sets the
stroke's width. A batch is warped (shear, rotation, stretch), thresholded, cut to its
bounding box, placed, and averaged down to the final size: whole batches in torch, no loop over images.
The layout follows the public description of scikit-learn's digits (UCI "Optical recognition of handwritten
digits": 32x32 bitmaps fitted to the digit, counts over 4x4 blocks), not the scans themselves.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dpfast.errors import DataError

# Bundled fonts whose characters 0 to 9 look like digits. Left out: the symbol and size fonts (STIXNonUni*,
# STIXSiz*, cmex10, cmsy10), the display subsets and the last-resort font.
_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
_FIELD = 64  # side of a distance field; the glyph's height fills _GLYPH of it
_GLYPH = 40
_CANVAS = 48  # side of the canvas the warped glyph is drawn on before its box is cut out
_BLOCK = 4  # final pixels are means of _BLOCK x _BLOCK samples


@dataclass(frozen=True, kw_only=True)
class FontStyle:
    """How far rendered digits stray from the printed ones. The default fits the digit to a wide box, in thin strokes.

    slant: largest shear, width per height; rotation: largest angle, radians; stretch: range of horizontal stretch
    before rotating; stroke: range of the main stroke's half-width, in 1/40 of the digit's height; fill and box_width:
    range of the box's height and width, in image sides.
    """

    slant: float = 0.3
    rotation: float = 0.2
    stretch: tuple[float, float] = (0.8, 1.2)
    stroke: tuple[float, float] = (1.0, 3.0)
    fill: tuple[float, float] = (0.75, 1.0)
    box_width: tuple[float, float] = (0.8, 1.0)


def render_digits(labels: Tensor, *, seed: int, size: int = 8, style: FontStyle | None = None) -> Tensor:
    """Images uint8 ``[n, 1, size, size]`` (ink 255 on 0) of digits ``labels`` int64 ``[n]``; fixed by ``seed``."""
    if not len(labels):
        return torch.empty(0, 1, size, size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([_render(chunk, size, style or FontStyle(), generator) for chunk in labels.split(2048)])


def _render(labels: Tensor, size: int, style: FontStyle, generator: Generator) -> Tensor:
    fields, half_widths = glyph_fields()
    font = torch.randint(fields.shape[0], labels.shape, generator=generator)
    field, half_width = fields[font, labels], half_widths[font, labels]
    warped = F.grid_sample(field[:, None], _warp(len(labels), style, generator), align_corners=False,
                           padding_mode="border")  # fmt: skip
    # Hardly thinner than the font draws it: without its serif font's hairlines an 8 falls into pieces.
    grow = torch.maximum(_uniform(len(labels), style.stroke, generator) - half_width, -0.2 * half_width)
    ink = torch.sigmoid(2.0 * (warped[:, 0] + grow[:, None, None]))
    return _fit_box(ink, size, style, generator)


def _warp(count: int, style: FontStyle, generator: Generator) -> Tensor:
    """Sampling grids ``[count, _CANVAS, _CANVAS, 2]``: position on the canvas -> position in the distance field."""
    slant = _uniform(count, (-style.slant, style.slant), generator)
    angle = _uniform(count, (-style.rotation, style.rotation), generator)
    stretch = _uniform(count, style.stretch, generator)
    zero, one = torch.zeros(count), torch.ones(count)
    rotate = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    linear = _matrices(1 / stretch, zero, zero, one) @ _matrices(one, slant, zero, one) @ rotate
    grid = F.affine_grid(F.pad(linear, (0, 1)), [count, 1, _CANVAS, _CANVAS], align_corners=False)
    return grid


def _fit_box(ink: Tensor, size: int, style: FontStyle, generator: Generator) -> Tensor:
    """Cut the ink ``[n, _CANVAS, _CANVAS]`` to its box, scale the box to the image, place it, average blocks."""
    top, bottom = _span(ink.amax(dim=2))
    left, right = _span(ink.amax(dim=1))
    fill = _uniform(len(ink), style.fill, generator)
    scale_y = (bottom - top) / (2 * fill)
    scale_x = (right - left) / (2 * _uniform(len(ink), style.box_width, generator))
    below = _uniform(len(ink), (-1.0, 1.0), generator)
    center_x = (left + right) / 2
    center_y = (top + bottom) / 2 + below * (1 - fill) * scale_y  # stays within the image
    zero = torch.zeros_like(fill)
    theta = torch.stack([scale_x, zero, center_x, zero, scale_y, center_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(ink), 1, size * _BLOCK, size * _BLOCK], align_corners=False)
    fine = F.grid_sample(ink[:, None], grid, align_corners=False)
    return (F.avg_pool2d(fine, _BLOCK) * 255).round().to(torch.uint8)


def _span(profile: Tensor) -> tuple[Tensor, Tensor]:
    """First and last edge of the ink in each profile ``[n, side]``, in grid coordinates (-1 to 1)."""
    side = profile.shape[1]
    inked = (profile > 0.5).int()
    first = inked.argmax(dim=1)
    last = side - inked.flip(1).argmax(dim=1)
    return 2 * first / side - 1, 2 * last / side - 1


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices ``[[a, b], [c, d]]``, ``[n, 2, 2]``."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _uniform(count: int, span: tuple[float, float], generator: Generator) -> Tensor:
    return torch.empty(count).uniform_(*span, generator=generator)


@cache
def glyph_fields() -> tuple[Tensor, Tensor]:
    """Signed distances ``[fonts, 10, _FIELD, _FIELD]`` in pixels, positive in the stroke; half-widths ``[fonts, 10]``.

    Raises DataError if none of the expected fonts is installed with matplotlib.
    """
    fields = torch.stack([torch.stack([_distance_field(path, c) for c in "0123456789"]) for path in _font_paths()])
    inside = fields.clamp_min(0).flatten(2)
    # The mean distance to the edge inside a strip of half-width h is h / 2.
    half_widths = 2 * inside.sum(2) / (inside > 0).sum(2)
    return fields, half_widths


def _font_paths() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [path for name in _FONTS if (path := folder / f"{name}.ttf").exists()]
    if not paths:
        raise DataError(f"none of matplotlib's fonts found in {folder}; reinstall matplotlib with its bundled data")
    return paths


def _distance_field(path: Path, character: str) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    font = ImageFont.truetype(str(path), 200)
    left, top, right, bottom = font.getbbox(character)
    large = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(large).text((-left, -top), character, font=font, fill=255)
    box = large.getbbox()
    if box is None:
        raise DataError(f"{path.name} draws nothing for {character!r}; reinstall matplotlib")
    large = large.crop(box)
    oversampling = 2  # distances are found on a finer grid: a bitmap's edge is only known to a pixel
    height = _GLYPH * oversampling
    width = min(round(height * large.width / large.height), _FIELD * oversampling)
    side = _FIELD * oversampling
    canvas = np.zeros((side, side), dtype=bool)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = np.asarray(large.resize((width, height))) > 127
    distance = distance_transform_edt(canvas) - distance_transform_edt(~canvas)
    field = torch.from_numpy(distance / oversampling).float()
    return F.avg_pool2d(field[None], oversampling)[0]
