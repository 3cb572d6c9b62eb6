"""Data: labeled image sets, and the digits that every installation brings along."""

from dpfast.data.digits import DIGIT_CLASSES, font_digits, real_digits
from dpfast.data.fonts import FontStyle
from dpfast.data.images import ImageSet

__all__ = ["DIGIT_CLASSES", "FontStyle", "ImageSet", "font_digits", "real_digits"]
