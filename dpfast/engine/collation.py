"""That a collate function keeps examples apart: shown by collating other items beside the same."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dpfast.clipping.rounding import but_zeros, differ, of_columns
from dpfast.clipping.trees import leaves
from dpfast.engine.batches import Entries, parts_of, rows_at, rows_dim, tensors_of
from dpfast.engine.exchange import exchanged_halves
from dpfast.engine.padding import UNSEEN, Padded, narrowings
from dpfast.errors import PrivacyError
from dpfast.seeding import RandomState

_NUMBERS = bool | int | float | complex | np.bool_ | np.number | np.ndarray


class Collate:
    """``collate``, which the first, second, fourth, ... batch in each process shows to keep examples apart.

    Items of half of the places are exchanged for others: the rows of the other half must be the same (up to padding,
    left or right, to another length). Not shown where collating draws another number of random numbers then, or fails.
    Where it pads less, the batch comes as ``Padded``, for the session to show that the padding reaches nobody else.

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
        halves = exchanged_halves(len(items))
        worlds = [(kept, places, [copy.deepcopy(items[p]) for p in places]) for kept, places in halves]
        before = RandomState()
        batch = self.collate(items)
        after, less = RandomState(), None
        for kept, places, others in worlds:
            before.restore()
            try:
                other = self.collate(others)
            except Exception:
                continue
            if after.has_moved():
                self._warn_of_padding(batch, other)
            elif not self._is_apart(batch, other, len(items), kept):
                after.restore()
                raise PrivacyError(
                    "collate_fn: what it makes of one example depends on others in the batch (a mixture of images, a"
                    " statistic of the batch?). Make each row of one example alone, padding aside, and each number that"
                    " belongs to no row of none. What cannot be stacked, pad, or give as a list with an entry for each"
                    " example (not as one tensor of all together)"
                )
            elif _is_shorter(*(_rows_of(one, len(items), self.augmult) for one in (other, batch))):
                less = Padded(batch, kept, places, other)
        after.restore()
        return less or batch

    def _is_apart(self, batch: Any, other: Any, examples: int, kept: list[int]) -> bool:
        ours, theirs = (list(self._parts(one, examples)) for one in (batch, other))
        if len(ours) != len(theirs):
            return False
        sizes = {*(size for t in ours if isinstance(t, Tensor) for size in t.shape)}
        other_sizes = {*(size for t in theirs if isinstance(t, Tensor) for size in t.shape)}
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Tensor) and rows_dim(a, examples, self.augmult) is not None:
                if not self._are_same_rows(a, b, examples, kept):
                    return False
            elif isinstance(a, Entries):
                if not isinstance(b, Entries) or not self._are_same_entries(a, b, examples, kept):
                    return False
            elif not _is_same(*_as_rows(a, b)) and not (_is_one_of(a, sizes) and _is_one_of(b, other_sizes)):
                return False
        return True

    def _parts(self, batch: Any, examples: int) -> Iterator[Any]:
        for part in parts_of(batch, examples, self.augmult):
            yield from _without_numpy(part, lambda items: self._parts([items], examples))

    def _are_same_entries(self, a: Entries, b: Entries, examples: int, kept: list[int]) -> bool:
        if len(a) != len(b):
            return False
        rows = rows_at(kept, len(a) // examples)
        ours, theirs = _stacked(a), _stacked(b)
        if ours is not None and theirs is not None and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype):
            return not differ(ours[rows], theirs[rows], of_columns)
        return all(_is_same_tree(a[r], b[r]) for r in rows.tolist())

    def _are_same_rows(self, a: Tensor, b: Any, examples: int, kept: list[int]) -> bool:
        dim = rows_dim(a, examples, self.augmult)
        if not isinstance(b, Tensor) or dim is None or rows_dim(b, examples, self.augmult) != dim:
            return False
        if a.shape[dim] != b.shape[dim]:
            return False
        rows = rows_at(kept, a.shape[dim] // examples)
        return _same_but_for_padding(*(t.movedim(dim, 0)[rows] for t in (a, b)))

    def _warn_of_padding(self, batch: Any, other: Any) -> None:
        shapes = [[t.shape for t in tensors_of(one)] for one in (batch, other)]
        if shapes[0] != shapes[1] and not self._warned:
            self._warned = True
            warnings.warn(f"{UNSEEN}: collate_fn draws random numbers", stacklevel=2)


def _rows_of(batch: Any, examples: int, augmult: int) -> list[Tensor]:
    return [part for part in parts_of(batch, examples, augmult) if isinstance(part, Tensor)]


def _stacked(entries: Entries) -> Tensor | None:
    """As rows, if they are tensors of one kind, or arrays or (lists of) numbers of one shape."""
    if all(isinstance(entry, Tensor) for entry in entries):
        alike = len({(entry.shape, entry.dtype, entry.layout, entry.device) for entry in entries}) == 1
        return torch.stack(list(entries)) if alike and entries[0].layout is torch.strided else None
    parts = list(leaves(list(entries)))
    if not all(isinstance(part, _NUMBERS) for part in parts) or any(map(np.ma.isMaskedArray, parts)):
        return None
    try:
        rows = np.array(list(entries))
    except (ValueError, TypeError, OverflowError):  # of several shapes, say
        return None
    if rows.dtype.kind not in "biufc" or (rows.dtype.kind in "fc" and any(map(_is_whole, parts))):
        return None
    return _of_torch(rows)


def _is_whole(number: Any) -> bool:
    """Whether it is to be the same to the last digit."""
    return np.asarray(number).dtype.kind not in "fc"


def _is_same_tree(a: Any, b: Any) -> bool:
    ours, theirs = list(_values(a)), list(_values(b))
    return len(ours) == len(theirs) and all(map(_is_same, ours, theirs))


def _values(tree: Any) -> Iterator[Any]:
    for leaf in leaves(tree):
        if isinstance(leaf, Mapping):
            yield from _values(list(leaf.values()))
        else:
            yield from _without_numpy(leaf, _values)


def _as_rows(*values: Any) -> Iterator[Any]:
    """Tensors as a row each, so that each entry has a column of its own."""
    return (value[None] if isinstance(value, Tensor) and value.layout is torch.strided else value for value in values)


def _is_same(a: Any, b: Any) -> bool:
    """Whatever is neither tensor nor number (texts) is taken to be the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not differ(a, b, of_columns)
    if isinstance(a, Number) and isinstance(b, Number):
        return bool(a == b) or (a != a and b != b)  # NaN
    return not isinstance(a, Tensor | Number) and not isinstance(b, Tensor | Number)


def _without_numpy(value: Any, of_objects: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """What it holds, as tensors and Python's numbers: structured arrays field by field, times in microseconds, objects
    as the nested lists that ``of_objects`` takes.
    """
    if isinstance(value, np.ma.MaskedArray):
        yield from _without_numpy(np.ma.getmaskarray(value), of_objects)
        value = np.ma.getdata(value)
    if not isinstance(value, np.ndarray | np.generic):
        yield value
    elif value.dtype.names:
        for name in value.dtype.names:
            yield from _without_numpy(cast(Any, value)[name], of_objects)
    elif value.dtype.kind == "O":
        yield from of_objects(value.tolist())
    elif value.dtype.kind in "mM":
        yield from _without_numpy(value.astype(f"{value.dtype.kind}8[us]").view(np.int64), of_objects)
    elif value.dtype.kind not in "biufc":
        yield value
    else:
        is_whole = isinstance(value, np.generic) and value.dtype.kind in "biu"
        yield value.item() if is_whole else _of_torch(value)


def _of_torch(array: Any) -> Tensor:
    """An array of numbers."""
    wide = {"g": np.float64, "G": np.complex128}.get(array.dtype.char, array.dtype)  # which torch does not have
    return torch.from_numpy(np.array(array, dtype=np.dtype(wide).newbyteorder("=")))


def _is_one_of(number: Any, sizes: set[int]) -> bool:
    """Whether it says how long the rows are: a whole number, of the batch's sizes."""
    if isinstance(number, Tensor):
        number = number.item() if not number.ndim and not number.is_floating_point() else None
    return isinstance(number, int) and number in sizes


def _same_but_for_padding(a: Tensor, b: Tensor) -> bool:
    """Rows; where one has more entries along other dimensions, what it has more is the same in all rows."""
    if a.shape == b.shape:
        return not differ(a, b, of_columns)
    if a.ndim != b.ndim:
        return False
    sizes = [min(pair) for pair in zip(a.shape, b.shape, strict=True)]
    sides = zip(narrowings(a, sizes), narrowings(b, sizes), strict=True)
    padded = zip(_paddings(a, sizes), _paddings(b, sizes), strict=True)
    # What is computed in other shapes rounds otherwise: a column of rounding alone is not to be held against itself.
    return any(not differ(*side, but_zeros) and all(both) for side, both in zip(sides, padded, strict=True))


def _paddings(rows: Tensor, sizes: Sequence[int]) -> Iterator[bool]:
    """For each side, whether what lies outside of ``sizes`` is the same in all rows."""
    for side in range(2):
        outside = torch.ones_like(rows, dtype=torch.bool)
        list(narrowings(outside, sizes))[side].fill_(False)
        beyond = rows[outside].view(len(rows), -1)
        yield bool(((beyond == beyond[:1]) | (beyond.isnan() & beyond[:1].isnan())).all())


def _is_shorter(other: Sequence[Tensor], batch: Sequence[Tensor]) -> bool:
    """Whether some tensors are, and none is longer."""
    pairs = list(zip(other, batch, strict=False))
    some = any(a.shape != b.shape for a, b in pairs)
    return some and all(any(True for _ in narrowings(b, a.shape)) for a, b in pairs)
