"""Pickles of arrays, read without running anything that they say.

A pickle names functions, has them called and hands state to what they return. Here it may name four, and each is our
own: numpy's would take from it the flags of a dtype, which say whether bytes are pointers. Whatever else it names is
refused, not looked up.
"""

import io
import pickle
from typing import Any

import numpy as np

from dpfast.data.formats.reading import checked_labels, readable
from dpfast.errors import DataError, FileError


def unpickle(content: bytes, where: str) -> dict[str, Any]:
    """The dict that a pickle of Python 2 or 3 holds: arrays of numbers, lists, texts, numbers.

    Raises FileError that names ``where`` for a damaged pickle and for one that names anything else, DataError for one
    of no dict.
    """
    with readable(where):
        value = _Unpickler(content, where).load()
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a pickled dict, got {type(value).__name__}; get the file again")
    return {_text(key): item.value if isinstance(item, _Array) else item for key, item in value.items()}


def image_batch(
    content: bytes, where: str, *, labels: str, classes: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, 3, 32, 32]`` and labels of a pickled dict, its ``data`` and what stands under ``labels``.

    ``data`` is uint8 ``[n, 3072]``: 1024 red, 1024 green, 1024 blue values, each row by row. Raises FileError for what
    is no such pickle, DataError for arrays or labels that do not fit.
    """
    batch = unpickle(content, where)
    if not {"data", labels} <= batch.keys():
        raise DataError(f"{where}: expected the keys 'data' and {labels!r}, got {sorted(batch)}; get the file again")
    data = batch["data"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{where}: data must be uint8 [n, 3072], got {got}; get the file again")
    numbers = checked_labels(batch[labels], classes, where, first=first)
    if len(numbers) != len(data):
        raise DataError(f"{where}: expected {len(data)} labels, one per image, got {len(numbers)}; get the file again")
    return data.reshape(-1, 3, 32, 32), numbers


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")  # texts of Python 2 are bytes, and so are its arrays
        self._where = where

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _ADMITTED[module.replace("numpy._core.", "numpy.core."), name]  # numpy 2 renamed it
        except KeyError:
            raise FileError(
                f"{self._where}: expected a pickle of arrays, lists, texts and numbers, got one that names "
                f"{module}.{name}. Nothing of it was run: do not use this file, get it from where it is published"
            ) from None


class _DType:
    def __init__(self, code: str) -> None:
        self.value = np.dtype(code)
        if self.value.kind not in "biuf":
            raise ValueError(f"the pickle holds an array of {code!r}, not of numbers")

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])  # the rest says what a dtype of numbers has in any case


class _Array:
    def __init__(self) -> None:
        self.value = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if columns_first else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    """What protocol 5 calls in place of ``_reconstruct``."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _dtype(code: str, *_: Any) -> _DType:
    return _DType(code)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"the pickle holds bytes in the encoding {encoding!r}, not 'latin1'")
    return text.encode("latin1")


# Functions, no classes: a pickle may set attributes of what it has named, which must not change how arrays are made.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, never called
    ("_codecs", "encode"): _encode,
}


def _text(key: Any) -> str:
    """Keys are bytes where Python 3 wrote what it had read with encoding="bytes"."""
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
