"""The trees that a data loader gives: tensors in lists, tuples, dicts and the like (``BatchEncoding``), by rows."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.trees import replace_tensors, tensors_in


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


def rows_dim(t: Tensor, examples: int, augmult: int) -> int | None:
    """The dimension of ``t`` that has an entry for each row or example."""
    sizes = (examples * augmult, examples)
    return next((dim for dim, size in enumerate(t.shape[:2]) if size in sizes), None)


def rows_at(places: Sequence[int], each: int, device: torch.device | None = None) -> Tensor:
    """The indices of the rows that the examples in some places have, ``each`` of them so many."""
    return torch.tensor([p * each + k for p in places for k in range(each)], dtype=torch.int64, device=device)


def emptied(batch: Any, augmult: int) -> Any:
    """A batch of one example, without it: tensors of 0 rows, and nothing of its numbers."""

    def no_rows(t: Tensor) -> Tensor:
        dim = rows_dim(t, 1, augmult)
        return torch.zeros_like(t) if dim is None else t.narrow(dim, 0, 0).clone()

    if isinstance(batch, list) and not any(True for _ in tensors_of(batch)):
        return []  # names, texts
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(emptied(value, augmult) for value in batch)
    if isinstance(batch, dict | UserDict):
        return _with_values(batch, lambda value: emptied(value, augmult))
    return replace_tensors(batch, no_rows)


def _with_values(batch: Any, of: Callable[[Any], Any]) -> Any:
    """A copy of a mapping, with ``of(value)`` in the place of each value."""
    changed = copy.copy(batch)
    if isinstance(changed, UserDict):  # whose copy may share what it holds
        changed.data = dict(changed.data)
    for key, value in batch.items():
        changed[key] = of(value)
    return changed
