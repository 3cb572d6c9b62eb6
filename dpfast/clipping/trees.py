"""Calls and the tensors inside their arguments."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.dispatch import PLAIN

_LEAVES = frozenset((int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size))
_KEPT = _LEAVES | PLAIN  # of these types nothing is inside, and nothing changes


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in order, also inside lists, tuples, dicts, slices, namespaces and dataclasses."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    """``leaves`` without generators: every torch call of a step comes by here."""
    kind = type(value)
    if kind in PLAIN:
        found.append(value)
    elif kind is tuple or kind is list:
        for item in value:
            kind = type(item)
            if kind in PLAIN:
                found.append(item)
            elif kind not in _LEAVES:
                _collect(item, found)
    elif kind is dict:
        for item in value.values():
            if type(item) not in _LEAVES:
                _collect(item, found)
    elif kind not in _LEAVES:
        found.extend(leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples, dicts, slices, namespaces and dataclasses hold, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    elif isinstance(value, SimpleNamespace):
        yield from leaves(vars(value))
    elif _is_record(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


def replace_tensors(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """The same structure with each tensor replaced, visited in the order of ``tensors_in``."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, list | tuple):
        items = [replace_tensors(item, replace) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = replace_tensors(item, replace)
        return changed
    if isinstance(value, slice):
        return slice(*[replace_tensors(part, replace) for part in (value.start, value.stop, value.step)])
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**replace_tensors(vars(value), replace))
    if _is_record(value):
        record = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(record, field.name, replace_tensors(getattr(value, field.name), replace))
        return record
    return value


def own_lists(value: Any) -> Any:
    """The same arguments, less lists that the caller may change after the call."""
    for item in value.values() if isinstance(value, dict) else value:
        if type(item) not in _KEPT and _may_change(item):
            return replace_tensors(value, lambda t: t)
    return value


def _may_change(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, tuple) and any(map(_may_change, value)))


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


class TensorMap:
    """Something known of some tensors, by identity, as long as they live.

    ``torch.utils.weak.WeakTensorKeyDictionary`` in a tenth of the time. A tensor whose Python object has died and come
    back (C++ kept it) is not known any more.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def __contains__(self, t: Tensor) -> bool:
        entry = self._known.get(id(t))
        return entry is not None and entry[0]() is t

    def get(self, t: Tensor, default: Any) -> Any:
        """What is known of it."""
        entry = self._known.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else default

    def __setitem__(self, t: Tensor, value: Any) -> None:
        self._known[id(t)] = (weakref.ref(t), value)

    def __delitem__(self, t: Tensor) -> None:
        del self._known[id(t)]

    def __len__(self) -> int:
        return len(self._known)

    def update(self, tensors: Iterable[Tensor]) -> None:
        """That something is known of them."""
        for t in tensors:
            self[t] = True

    def keys(self) -> list[Tensor]:
        """Those that live."""
        return [t for reference, _ in self._known.values() if (t := reference()) is not None]

    def prune(self) -> None:
        """Forget the dead."""
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}


def function_name(func: Any) -> str:
    """As a person would call it."""
    return str(getattr(func, "__name__", func))
