"""Physical batches: the parts in which the examples of a step are run, and what becomes of one that does not fit."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpfast.performance import Performance

NUMBERS = 1 << 16  # of a physical batch: 1024 rows of 8x8 pixels cost 35% less each than 256 (2 cores)
# Of a GPU: 682 rows of 3x32x32 pixels. A step of an 83M UNet takes 0.14 s of Python however many rows it has, and of
# the GPU as long with some 500 (predicted for an H200: dpfast plan --device h200).
NUMBERS_OF_GPU = 1 << 21


@dataclass(frozen=True)
class Size:
    """Examples of a physical batch, and the rows of each that one pass runs; less than all only of one example."""

    examples: int
    rows: int

    def half(self) -> Size | None:
        """The next smaller size, or None after one row of one example."""
        if self.examples > 1:
            return replace(self, examples=math.ceil(self.examples / 2))
        return replace(self, rows=math.ceil(self.rows / 2)) if self.rows > 1 else None


def usual_size(
    performance: Performance, augmult: int, numbers_per_example: int, expected_batch_size: float, dataset_size: int
) -> Size:
    """Of a full physical batch, where no memory budget asks for less: no more than the expected batch, or where
    ``microbatch`` says how many, than the data set.
    """
    if performance.form == "example":
        return Size(1, augmult)
    numbers = NUMBERS_OF_GPU if performance.device.startswith("cuda") else NUMBERS
    fits = max(1, numbers // (augmult * numbers_per_example))
    usual = performance.microbatch or min(fits, math.ceil(expected_batch_size))
    return Size(min(usual, dataset_size), augmult)


def largest_fitting(size: Size, fits: Callable[[Size], bool]) -> Size | None:
    """The largest that fits and is no larger than ``size``: as many examples, or one example in the fewest passes."""
    if fits(size):
        return size
    fewer = range(size.examples - 1, 0, -1)
    found = bisect.bisect_left(fewer, True, key=lambda examples: fits(Size(examples, size.rows)))
    if found < len(fewer):
        return Size(fewer[found], size.rows)
    passes = range(2, size.rows + 1)
    found = bisect.bisect_left(passes, True, key=lambda n: fits(Size(1, math.ceil(size.rows / n))))
    return Size(1, math.ceil(size.rows / passes[found])) if found < len(passes) else None


@dataclass(frozen=True)
class Batch:
    """``m`` examples: ids ``[m]``, mask ``[m]`` (False: padding), and their tensors ``[m, ...]``.

    seed: of what belongs to places in the batch (dropout); first: the place of its first example in the batch that it
    is a part of.
    """

    ids: Tensor
    mask: Tensor
    examples: Sequence[Tensor]
    seed: int
    first: int = 0

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most ``size`` examples, less those of padding alone."""
        for start in range(0, len(self.ids), size):
            own = slice(start, start + size)
            if self.mask[own].any():
                examples = [x[own] for x in self.examples]
                yield replace(self, ids=self.ids[own], mask=self.mask[own], examples=examples, first=self.first + start)

    def seed_of(self, row: int) -> int:
        """For the pass that begins with this row of its examples: a part that is run again draws the same, and no two
        parts share what they draw.
        """
        text = f"{self.seed}/{self.first}/{row}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or, as torch's CPU allocator says it, of the machine."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )
