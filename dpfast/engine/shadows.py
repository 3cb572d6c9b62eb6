"""Worlds: the batch with other examples in some places, and what becomes of each tensor there.

A world does not know tensors by their values but by what was done to them: whatever torch function is called with a
tensor that has a shadow is called on the shadow, too, and its result there is the shadow of its result here.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.trees import TensorMap, function_name, leaves, replace_tensors, tensors_in


class Shadows(TensorMap):
    """The shadow of each tensor, for as long as the tensor lives."""

    def __setitem__(self, t: Tensor, shadow: Tensor) -> None:
        key, known = id(t), self._known

        def died(reference: "weakref.ref[Tensor]") -> None:
            entry = known.get(key)
            if entry is not None and entry[0] is reference:
                del known[key]

        known[key] = (weakref.ref(t, died), shadow)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Those that live, with their shadows."""
        entries = list(self._known.values())
        return [(t, shadow) for reference, shadow in entries if (t := reference()) is not None]


class World:
    """A batch in whose place p the example ``places[p]`` of the real one stands; None: the real one.

    kept: the places in which nothing changes, all by default. sizes: numbers of examples and of rows of the real batch,
    where this one has others: code that is told them by Python, or draws random numbers, does not fit this world.
    """

    def __init__(
        self,
        places: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.places, self.kept, self.sizes = places, kept, sizes
        self.told = False  # whether one of the sizes, or its reciprocal, was among the arguments of a function
        self.shadows = Shadows()
        self.leaves: dict[int, Tensor] = {}  # by id of a cut's leaf
        self.lost = ""  # why it cannot go on, in words

    def rows(self, t: Tensor, dim: int, each: int) -> Tensor:
        """``t``, which has ``each`` entries along ``dim`` for an example, in this world: a new tensor."""
        if self.places is None:
            return t.detach().clone()
        index = torch.tensor([p * each + k for p in self.places for k in range(each)], dtype=torch.int64)
        return t.detach().index_select(dim, index.to(t.device))

    @contextmanager
    def may_be_lost(self, what: str) -> Iterator[None]:
        """For what the user's own batch did not ask for: an error in it (memory may run out) is not theirs."""
        try:
            yield
        except Exception as error:
            self.lost = f"{type(error).__name__} in {what}"
            self.shadows = Shadows()

    def listen(self, value: Any) -> None:
        """Take note of sizes among the arguments of a function."""
        for number in leaves(value) if self.sizes and not self.told else ():
            if isinstance(number, int | float) and not isinstance(number, bool):
                self.told = any(number == size or number * size == 1 for size in self.sizes)

    def knows(self, value: Any) -> bool:
        """Whether any tensor in it has a shadow."""
        return any(t in self.shadows for t in tensors_in(value))

    def there(self, value: Any, written: Sequence[Tensor] = ()) -> Any:
        """The same with shadows in the place of tensors. ``written`` are about to change, here only."""
        for t in written:
            if t not in self.shadows:
                self.shadows[t] = t.clone()
        return replace_tensors(value, lambda t: self.shadows.get(t, t))

    def note(self, here: Any, there: Any) -> None:
        """That what came out here is this there."""
        ours, theirs = tensors_in(here), tensors_in(there)
        if len(ours) != len(theirs):
            self.lost = "a function returned another number of tensors"
            return
        for t, shadow in zip(ours, theirs, strict=True):
            if t is not shadow:
                self.shadows[t] = shadow


class DrawnState:
    """Of torch's generators, now."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def is_as(self, other: "DrawnState") -> bool:
        """Whether nothing was drawn between the two."""
        return torch.equal(self._cpu, other._cpu) and all(map(torch.equal, self._cuda, other._cuda))

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def call_in_all(
    worlds: Sequence[World], func: Callable[..., Any], args: Any, kwargs: Any, written: Sequence[Tensor]
) -> Any:
    """``func(*args, **kwargs)``, here and in every world that knows one of its arguments, with the same random numbers.

    written: the tensors that the call changes in place.
    """
    before = DrawnState()
    given = [world.there((args, kwargs), written) for world in worlds]
    output = func(*args, **kwargs)
    after = DrawnState()
    drawn = not before.is_as(after)
    for world, (own_args, own_kwargs) in zip(worlds, given, strict=True):
        if drawn and world.sizes:
            world.lost = "random numbers are drawn"
            continue
        before.restore()
        with world.may_be_lost(function_name(func)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said of the user's own call was said
            world.note(output, func(*own_args, **own_kwargs))
    after.restore()
    return output
