"""Data: labeled image sets, their keyed augmentation, and the digits that every installation brings along."""

from dpfast.data.augment import Augment
from dpfast.data.digits import DIGIT_CLASSES, font_digits, real_digits
from dpfast.data.fonts import FontStyle
from dpfast.data.images import ImageSet
from dpfast.data.keyed import RowKeys

__all__ = ["DIGIT_CLASSES", "Augment", "FontStyle", "ImageSet", "RowKeys", "font_digits", "real_digits"]
