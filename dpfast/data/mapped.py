"""Tensors that lie in files: the operating system reads what is used, and memory is that of what is used at a time."""

from __future__ import annotations

import math
import mmap
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dpfast.errors import FileError

# Without it, as numpy maps files, Linux wants memory for all that might be written: more than there is is refused.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it since 3.13


def map_file(file: IO[Any]) -> mmap.mmap:
    """All of an open file, to be copied on write: torch wants memory that can be written to, and a file must not be."""
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def on_disk(blocks: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """The blocks one behind the other, as one tensor of this shape. It lies in a file of ``folder`` that has no name
    and is gone with the tensor; no more than a block is in memory.

    Where nothing can be written to ``folder``, the system's folder for temporary files takes its place. Raises
    FileError when the disk is full.
    """
    like = torch.empty(0, dtype=dtype).numpy().dtype
    with _nameless(folder) as file:
        for block in blocks:
            _write(file, block.contiguous().numpy().data, folder)
        if file.tell() != math.prod(shape) * like.itemsize:
            raise ValueError(f"blocks of {file.tell()} bytes do not make {dtype} {shape}")
        return torch.from_numpy(np.ndarray(shape, like, map_file(file) if file.tell() else None))


def _write(file: IO[bytes], content: memoryview, folder: Path) -> None:
    try:
        file.write(content)
        file.flush()
    except OSError as error:
        raise FileError(f"cannot write to {folder} ({error.strerror}): make room, then run again") from error


def _nameless(folder: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()
