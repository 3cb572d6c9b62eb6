"""The trees that a data loader gives: tensors in lists, tuples, dicts and the like (``BatchEncoding``), by rows."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.trees import leaves, replace_tensors, tensors_in

# A view whose entries lie further apart (in a whole data set, say) is copied without what is between them.
_SPREAD, _SMALL = 32, 1 << 20  # times the entries' memory, and bytes
_ALIGNED = 64  # entries, more than a processor's vector holds: kernels treat what lies before a full vector by itself


def mapped(batch: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """The same batch with other tensors."""
    if isinstance(batch, dict | UserDict):
        return _with_values(batch, lambda value: mapped(value, of))
    if type(batch) in (list, tuple):
        return type(batch)(mapped(value, of) for value in batch)
    return replace_tensors(batch, of)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in it, in order."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_of(value)
    else:
        yield from tensors_in(batch)


class Entries(list[Any]):
    """A list of a batch with an entry for each row or example: boxes, texts, whatever cannot be stacked."""


def parts_of(batch: Any, examples: int, augmult: int) -> Iterator[Any]:
    """Tensors, ``Entries`` and all else in it, in order."""
    return _parts(batch, (examples * augmult, examples), inner=False)


def _parts(value: Any, sizes: tuple[int, int], *, inner: bool) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _parts(item, sizes, inner=True)
    elif isinstance(value, list | tuple) and inner and len(value) in sizes and not _are_columns(value, sizes):
        yield Entries(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, sizes, inner=True)
    else:
        yield from leaves(value)


def _are_columns(value: Sequence[Any], sizes: tuple[int, int]) -> bool:
    """Whether each entry has rows of its own."""
    return all(isinstance(item, Tensor) and item.ndim and len(item) in sizes for item in value)


def rows_dim(t: Tensor, examples: int, augmult: int) -> int | None:
    """The dimension of ``t`` that has an entry for each row or example."""
    sizes = (examples * augmult, examples)
    return next((dim for dim, size in enumerate(t.shape[:2]) if size in sizes), None)


def rows_at(places: Sequence[int], each: int, device: torch.device | None = None) -> Tensor:
    """The indices of the rows that the examples in some places have, ``each`` of them so many."""
    return torch.tensor([p * each + k for p in places for k in range(each)], dtype=torch.int64, device=device)


def copied(t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` in memory of its own, laid out as ``like`` (by default ``t``), of which it may hold some rows.

    The layout decides which kernels compute with it, and these differ in rounding. What autograd follows is cloned.
    """
    like = t if like is None else like
    if t.requires_grad or like.layout is not torch.strided or not t.numel():
        return t.clone()
    extent, overlaps = 1, False  # from the first entry in memory to behind the last
    for stride, size in sorted(zip(like.stride(), like.shape, strict=True)):
        if stride and size > 1:
            overlaps |= stride < extent
            extent += stride * (size - 1)
    if extent > _SPREAD * like.numel() and extent * t.element_size() > _SMALL:
        return t.clone()
    offset = like.storage_offset() % _ALIGNED
    own = t.new_empty(offset + extent).as_strided(t.shape, like.stride(), offset)
    once = tuple(slice(None if stride else 1) for stride in like.stride())  # expanded entries share their memory
    own[once].copy_(t[once])
    return t.clone() if overlaps and not torch.equal(own, t) else own


def emptied(batch: Any, augmult: int, *, inner: bool = False) -> Any:
    """A batch of one example, without it: tensors of 0 rows, and nothing of its numbers."""

    def no_rows(t: Tensor) -> Tensor:
        dim = rows_dim(t, 1, augmult)
        return torch.zeros_like(t) if dim is None else t.narrow(dim, 0, 0).clone()

    if isinstance(batch, list) and not any(True for _ in tensors_of(batch)):
        return []  # names, texts
    if inner and type(batch) in (list, tuple) and batch and isinstance(batch[0], dict | list | tuple):
        return type(batch)()  # an entry for each example
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(emptied(value, augmult, inner=True) for value in batch)
    if isinstance(batch, dict | UserDict):
        return _with_values(batch, lambda value: emptied(value, augmult, inner=True))
    return replace_tensors(batch, no_rows)


def _with_values(batch: Any, of: Callable[[Any], Any]) -> Any:
    """A copy of a mapping, with ``of(value)`` in the place of each value."""
    changed = copy.copy(batch)
    if isinstance(changed, UserDict):  # whose copy may share what it holds
        changed.data = dict(changed.data)
    for key, value in batch.items():
        changed[key] = of(value)
    return changed
