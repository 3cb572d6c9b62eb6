"""Data: labeled image sets in memory or in stores on disk, their keyed augmentation, and digits to try them with."""

from dpfast.data.augment import Augment
from dpfast.data.digits import DIGIT_CLASSES, font_digits, real_digits
from dpfast.data.fonts import FontStyle
from dpfast.data.images import ImageSet
from dpfast.data.keyed import RowKeys
from dpfast.data.prepare import prepare_store
from dpfast.data.store import Store, StoredImages, open_store, read_store
from dpfast.data.store_writer import StoreWriter

__all__ = [
    "DIGIT_CLASSES",
    "Augment",
    "FontStyle",
    "ImageSet",
    "RowKeys",
    "Store",
    "StoreWriter",
    "StoredImages",
    "font_digits",
    "open_store",
    "prepare_store",
    "read_store",
    "real_digits",
]
