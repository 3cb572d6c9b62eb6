"""Worlds: the batch with other examples in some places, and what becomes of each tensor there.

A world does not know tensors by their values but by what was done to them: whatever torch function is called with a
tensor that has a shadow is called on the shadow, too, and its result there is the shadow of its result here.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.trees import TensorMap, function_name, leaves, replace_tensors, tensors_in
from dpfast.engine.batches import rows_at
from dpfast.engine.readings import Readings


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


class Memories:
    """Shadows of the memory that was written to: of tensors known by nothing else, their views, and ``data``."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Tensor]] = {}  # by id of the storage: a shadow of all of it

    def __len__(self) -> int:
        return len(self._known)

    def pairs(self) -> list[tuple[Any, Tensor]]:
        """Storages that live, with their shadows."""
        entries = list(self._known.values())
        return [(storage, shadow) for reference, shadow in entries if (storage := reference()) is not None]

    def __setitem__(self, storage: Any, shadow: Tensor) -> None:
        self._known[id(storage)] = (weakref.ref(storage), shadow)

    def take(self, t: Tensor) -> None:
        """From now on the memory of ``t`` has a shadow."""
        if t.layout is torch.strided and self.shadow_of(t) is None:
            storage = t.untyped_storage()
            self[storage] = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage).clone()

    def shadow_of(self, t: Tensor) -> Tensor | None:
        """A view of the shadow, if there is one."""
        if not self._known or t.layout is not torch.strided:
            return None
        storage = t.untyped_storage()
        reference, shadow = self._known.get(id(storage), (None, None))
        if reference is None or reference() is not storage or shadow is None or shadow.dtype != t.dtype:
            return None
        return shadow.as_strided(t.shape, t.stride(), t.storage_offset())


class World:
    """A batch in whose place p the example ``places[p]`` of the real one stands; None: the real one.

    kept: the places in which nothing changes, all by default. sizes: numbers of rows and of examples of the real batch,
    where this one has less of the same: whatever has as many rows has less there, too, and what is drawn at random is
    drawn once for both.
    """

    def __init__(
        self,
        places: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.places, self.kept, self.sizes = places, kept, sizes
        self.told = False  # whether one of the sizes, or its reciprocal, came from Python as an argument of a function
        self.readings = Readings()
        self.shadows = Shadows()
        self.memories = Memories()
        self.leaves: dict[int, Tensor] = {}  # by id of a cut's leaf
        self.lost = ""  # why it cannot go on, in words

    def rows(self, t: Tensor, dim: int, each: int) -> Tensor:
        """``t``, which has ``each`` entries along ``dim`` for an example, in this world: a new tensor."""
        if self.places is None:
            return t.clone()
        return t.index_select(dim, rows_at(self.places, each, t.device))

    def part_of(self, t: Tensor) -> Tensor | None:
        """What ``t`` is in a world of other sizes, if it has the real one's; for results of one function that rows do
        not meet in, whatever it draws.
        """
        if t.ndim == 0 or t.shape[0] not in self.sizes:
            return None
        return self.rows(t, 0, t.shape[0] // self.sizes[-1])

    @contextmanager
    def may_be_lost(self, what: str) -> Iterator[None]:
        """For what the user's own batch did not ask for: an error in it (memory may run out) is not theirs."""
        try:
            yield
        except Exception as error:
            self.lose(f"{type(error).__name__} in {what}")

    def lose(self, why: str) -> None:
        """Go on no more."""
        self.lost, self.shadows, self.memories = why, Shadows(), Memories()

    def listen(self, value: Any) -> None:
        """Take note of sizes among the arguments of a function."""
        for number in leaves(value) if self.sizes and not self.told else ():
            if isinstance(number, int | float) and not isinstance(number, bool):
                self.told |= any(number == size or number * size == 1 for size in self.sizes)

    def knows(self, value: Any) -> bool:
        """Whether any tensor in it has a shadow."""
        return any(self.shadow_of(t) is not None for t in tensors_in(value))

    def shadow_of(self, t: Tensor) -> Tensor | None:
        """What it is in this world, if that is another tensor."""
        shadow: Tensor | None = self.shadows.get(t, None)
        if shadow is None and (shadow := self.memories.shadow_of(t)) is not None:
            self.shadows[t] = shadow
        return shadow

    def take_over(self, earlier: "World") -> None:
        """What lives of an earlier world is what it was there."""
        for t, shadow in earlier.shadows.pairs():
            self.shadows[t] = shadow.detach()
        for storage, shadow in earlier.memories.pairs():
            self.memories[storage] = shadow.detach()

    def there(self, value: Any, written: Sequence[Tensor] = ()) -> Any:
        """The same with shadows in the place of tensors. ``written`` are about to change, here only."""
        for t in written:
            if self.shadow_of(t) is not None:
                continue
            if self.sizes or t.requires_grad:
                part = self.part_of(t)
                self.shadows[t] = t.clone() if part is None else part
            else:
                self.memories.take(t)
        return replace_tensors(value, self._there)

    def _there(self, t: Tensor) -> Tensor:
        shadow = self.shadow_of(t)
        shadow = self.part_of(t) if shadow is None else shadow
        return t if shadow is None else shadow

    def given(self, func: Any, args: Any, kwargs: Any, written: Sequence[Tensor]) -> tuple[Any, Any]:
        """The arguments of a call in this world."""
        args, kwargs = self.readings.in_call(func, args, kwargs)
        self.listen((args, kwargs))
        there: tuple[Any, Any] = self.there((args, kwargs), written)
        return there

    def note_parts(self, here: Any) -> None:
        """That what came out here is less of the same there."""
        parts = [self.part_of(t) for t in tensors_in(here)]
        if any(part is None for part in parts):
            self.lose("random numbers are drawn")
        else:
            self.note(here, parts)

    def note(self, here: Any, there: Any) -> None:
        """That what came out here is this there."""
        ours, theirs = tensors_in(here), tensors_in(there)
        if len(ours) != len(theirs):
            self.lose("a function returned another number of tensors")
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
    given = [world.given(func, args, kwargs, written) for world in worlds]
    output = func(*args, **kwargs)
    after = DrawnState()
    drawn = not before.is_as(after)
    for world, (own_args, own_kwargs) in zip(worlds, given, strict=True):
        before.restore()
        with world.may_be_lost(function_name(func)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said of the user's own call was said
            if drawn and world.sizes:
                world.note_parts(output)
            else:
                world.note(output, func(*own_args, **own_kwargs))
    after.restore()
    return output


def read_in_all(worlds: Sequence[World], func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``, a number that Python is told, and what it is in every world."""
    output = func(*args, **kwargs)
    for world in worlds:
        with contextlib.suppress(Exception):  # not one number there
            own_args, own_kwargs = world.there((args, kwargs))
            world.readings.note(output, func(*own_args, **own_kwargs))
    return output
