"""Encoded images (PNG, JPEG and what else Pillow reads) as arrays and back, and images of another size."""

from __future__ import annotations

import io
import os
from typing import IO, TYPE_CHECKING

import numpy as np

from dpfast.errors import DataError, FileError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # those of torchvision
RESIZING = "centre crop to a square, then {size}x{size}: averaged over areas (box) from larger, bicubic from smaller"
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F")  # and I;16, I;16B, ...: 16 or 32 bits, which Pillow clips to 255 without a word


def peek(file: IO[bytes], where: str) -> tuple[int, tuple[int, int]]:
    """(channels, (height, width)) from the header alone. Raises FileError if it is no image of 8 bits or fewer."""
    with _opened(file, where) as picture:
        return (1 if picture.mode in _GREY else 3), (picture.height, picture.width)


def decode(content: bytes, where: str, *, channels: int, size: int | None = None) -> np.ndarray:
    """uint8 ``[channels, H, W]``, cropped and scaled to ``size`` by ``size`` if that is given. Transparency is dropped.

    Raises FileError that names ``where`` if it cannot be decoded, DataError for a colour image where ``channels`` is 1.
    """
    with _opened(io.BytesIO(content), where) as picture:
        if channels == 1 and picture.mode not in _GREY:
            raise DataError(
                f"{where}: expected a grey image like those before it, got mode {picture.mode}; convert all to one mode"
            )
        try:
            converted = picture.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
            raise _undecodable(where, error) from error
    pixels = np.asarray(converted if size is None else _fitted(converted, size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def encode(image: np.ndarray) -> bytes:
    """PNG of uint8 ``[1 or 3, H, W]``."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 ``[m, C, H, W]`` -> uint8 ``[m, C, size, size]`` by the rule ``RESIZING``."""
    from PIL import Image

    if images.shape[2:] == (size, size):
        return images
    result = np.empty((*images.shape[:2], size, size), np.uint8)
    for image, place in zip(images, result, strict=True):
        # One channel at a time gives the same pixels as all together, and needs no other order of the axes.
        for channel, out in zip(image, place, strict=True):
            out[:] = np.asarray(_fitted(Image.fromarray(np.ascontiguousarray(channel)), size))
    return result


def _opened(file: IO[bytes], where: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(file)
    except UnidentifiedImageError as error:
        found = "is no image that Pillow reads" if file.seek(0, os.SEEK_END) else "is empty"
        raise FileError(f"{where} {found}; replace or remove it") from error
    except Exception as error:  # as above
        raise _undecodable(where, error) from error
    if picture.mode.split(";")[0] in _DEEP:
        picture.close()
        raise FileError(f"{where}: expected 8 bits per channel, got mode {picture.mode}; convert it to 8 bits first")
    return picture


def _undecodable(where: str, error: Exception) -> FileError:
    return FileError(f"{where} cannot be decoded ({error}): it is truncated, damaged or no image; replace or remove it")


def _fitted(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image, ImageOps

    smaller = min(picture.size) < size
    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC if smaller else Image.Resampling.BOX)
