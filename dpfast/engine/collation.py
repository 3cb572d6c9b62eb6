"""That a collate function keeps examples apart: shown by collating other items beside the same."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.trees import leaves
from dpfast.engine.batches import rows_dim, tensors_of
from dpfast.engine.exchange import exchanged_halves
from dpfast.errors import PrivacyError
from dpfast.seeding import RandomState


class Collate:
    """``collate``, which the first, second, fourth, ... batch in each process shows to keep examples apart.

    Items of half of the places are exchanged for others: the rows of the other half must be the same (up to padding,
    left or right, to another length). Not shown where collating draws another number of random numbers then, or fails.

    Raises ``PrivacyError`` where they are not.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], augmult: int) -> None:
        self.collate, self.augmult = collate, augmult
        self._batches, self._warned = 0, False

    def __call__(self, items: list[Any]) -> Any:
        if len(items) < 2:
            return self.collate(items)
        self._batches += 1
        if self._batches & (self._batches - 1):
            return self.collate(items)
        worlds = [(kept, [copy.deepcopy(items[p]) for p in places]) for kept, places in exchanged_halves(len(items))]
        before = RandomState()
        batch = self.collate(items)
        after = RandomState()
        for kept, others in worlds:
            before.restore()
            try:
                other = self.collate(others)
            except Exception:
                continue
            if not after.has_moved() and not self._is_apart(batch, other, len(items), kept):
                after.restore()
                raise PrivacyError(
                    "collate_fn: what it makes of one example depends on others in the batch (a mixture of images, a"
                    " statistic of the batch?). Make each row of one example alone, padding aside, and each number that"
                    " belongs to no row of none"
                )
        after.restore()
        return batch

    def _is_apart(self, batch: Any, other: Any, examples: int, kept: list[int]) -> bool:
        ours, theirs = list(tensors_of(batch)), list(tensors_of(other))
        if len(ours) != len(theirs):
            return False
        for a, b in zip(ours, theirs, strict=True):
            dim = rows_dim(a, examples, self.augmult)
            if dim is None:
                if not _same(a, b) and not (_is_size(a, ours) and _is_size(b, theirs)):
                    return False
                continue
            if rows_dim(b, examples, self.augmult) != dim or a.shape[dim] != b.shape[dim]:
                return False
            each = a.shape[dim] // examples
            rows = torch.tensor([p * each + k for p in kept for k in range(each)])
            if not _same_but_for_padding(*(t.movedim(dim, 0)[rows] for t in (a, b))):
                return False
            if a.shape != b.shape:
                self._warn_of_padding()
        numbers = zip(_numbers(batch), _numbers(other), strict=False)
        return all(a == b or (_is_size(a, ours) and _is_size(b, theirs)) for a, b in numbers)

    def _warn_of_padding(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "collate_fn pads to the longest example of the batch, whose length then reaches every row: a mean over"
                " padded tokens, in the model or in the loss, would make what an example contributes depend on others,"
                " which is not seen. Pad to a fixed length, or mask the padding everywhere",
                stacklevel=2,
            )


def _numbers(batch: Any) -> list[int | float]:
    return [x for x in leaves(batch) if isinstance(x, int | float) and not isinstance(x, bool)]


def _is_size(number: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether it says how long the rows are: a whole number, of the batch's sizes."""
    if isinstance(number, Tensor):
        number = number.item() if not number.ndim and not number.is_floating_point() else None
    return isinstance(number, int) and any(number in t.shape for t in tensors)


def _same_but_for_padding(a: Tensor, b: Tensor) -> bool:
    """Rows; where one has more entries along other dimensions, what it has more is the same in all rows."""
    if a.shape == b.shape:
        return _same(a, b)
    if a.ndim != b.ndim:
        return False
    sizes = [min(pair) for pair in zip(a.shape, b.shape, strict=True)]
    left, right = ([slice(size) for size in sizes], [slice(-size or None, None) for size in sizes])
    return any(_same(a[at], b[at]) and _padded(a, at) and _padded(b, at) for at in map(tuple, (left, right)))


def _padded(rows: Tensor, at: Sequence[slice]) -> bool:
    """Whether what lies outside of ``at`` is the same in all rows."""
    outside = torch.ones_like(rows, dtype=torch.bool)
    outside[tuple(at)] = False
    beyond = rows[outside].view(len(rows), -1)
    return bool((beyond == beyond[:1]).all())


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to rounding."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
