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

from dpfast.clipping.functions import INDEXED
from dpfast.clipping.trees import TensorMap, function_name, replace_tensors, tensors_in
from dpfast.engine.batches import copied, rows_at
from dpfast.engine.readings import Readings, read, takes_numbers, takes_sizes, with_numbers
from dpfast.seeding import RandomState

_LARGE = 1 << 27  # bytes of a tensor that is not copied into every world, a store of a whole data set's outputs, say


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


class Memories(Shadows):
    """Shadows of memory that was written to, by storage: of tensors known by nothing else, their views, ``data``."""

    def take(self, t: Tensor) -> None:
        """From now on the memory of ``t`` has a shadow."""
        if t.layout is torch.strided and self.shadow_of(t) is None:
            storage: Any = t.untyped_storage()
            if storage.nbytes() > _LARGE:
                raise Unseen(f"a tensor of {storage.nbytes() >> 20} MiB is written to, too large for copies of it")
            self[storage] = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage).clone()

    def shadow_of(self, t: Tensor) -> Tensor | None:
        """A view of the shadow, if there is one."""
        if not len(self) or t.layout is not torch.strided:
            return None
        storage: Any = t.untyped_storage()
        shadow: Tensor | None = self.get(storage, None)
        if shadow is None or shadow.dtype != t.dtype:
            return None
        return shadow.as_strided(t.shape, t.stride(), t.storage_offset())


class Unseen(Exception):
    """What cannot be shown in a world, and why."""


class World:
    """A batch in whose place p the example ``places[p]`` of the real one stands; None: the real one.

    kept: the places in which nothing changes, all by default. earlier: worlds of which this one is what is left.
    """

    def __init__(
        self,
        places: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        earlier: "Sequence[World]" = (),
    ) -> None:
        self.places, self.kept = places, kept
        self.readings: Readings = Readings([world.readings for world in earlier])
        self.shadows = Shadows()
        self.memories = Memories()
        self.leaves: dict[int, Tensor] = {}  # by id of a cut's leaf
        self.lost = ""  # why it cannot go on, in words
        for world in earlier:
            self._take_over(world)

    def _take_over(self, earlier: "World") -> None:
        """What lives of an earlier world is what it was there."""
        for mine, theirs in ((self.shadows, earlier.shadows), (self.memories, earlier.memories)):
            for known, shadow in theirs.pairs():
                mine[known] = shadow.detach()

    @property
    def is_real(self) -> bool:
        """Whether nothing is other here."""
        return not (len(self.shadows) or len(self.memories) or self.readings.lives)

    @contextmanager
    def may_be_lost(self, what: str) -> Iterator[None]:
        """For what the user's own batch did not ask for: an error in it (memory may run out) is not theirs."""
        try:
            yield
        except Unseen as error:
            self.lose(str(error))
        except Exception as error:
            self.lose(f"{type(error).__name__} in {what}")

    def lose(self, why: str) -> None:
        """Go on no more."""
        self.lost, self.shadows, self.memories, self.readings = why, Shadows(), Memories(), Readings()

    # Tensors

    def rows(self, t: Tensor, dim: int, each: int) -> Tensor:
        """``t``, which has ``each`` entries along ``dim`` for an example, in this world: a new tensor."""
        if self.places is None:
            return copied(t)
        return copied(t.index_select(dim, rows_at(self.places, each, t.device)), like=t)

    def part_of(self, t: Tensor) -> Tensor | None:  # noqa: ARG002  # of others
        """What a tensor is that has no shadow, if it is another."""
        return None

    def shadow_of(self, t: Tensor) -> Tensor | None:
        """What it is in this world, if that is another tensor."""
        shadow: Tensor | None = self.shadows.get(t, None)
        if shadow is None and (shadow := self.memories.shadow_of(t)) is not None:
            self.shadows[t] = shadow
        return shadow

    def knows(self, value: Any) -> bool:
        """Whether any tensor or number in it is known to be another here."""
        return any(self.shadow_of(t) is not None for t in tensors_in(value)) or self.readings.differ(value)

    def there(self, value: Any, written: Sequence[Tensor] = ()) -> Any:
        """The same with shadows in the place of tensors. ``written`` are about to change, here only."""
        for t in written:
            if self.shadow_of(t) is not None:
                continue
            if (part := self.part_of(t)) is not None:
                self.shadows[t] = part
            elif t.requires_grad:
                self.shadows[t] = t.clone()
            else:
                self.memories.take(t)
        value = with_numbers(value, self.readings.value_of) if self.readings.lives else value
        return replace_tensors(value, self._tensor_there)

    def _tensor_there(self, t: Tensor) -> Tensor:
        shadow = self.shadow_of(t)
        shadow = self.part_of(t) if shadow is None else shadow
        if shadow is None:
            return t
        if self.places is not None and t.grad_fn is not None and not shadow.requires_grad:
            raise Unseen("a function has a gradient that torch functions do not show (an autograd.Function?)")
        return shadow

    # Calls

    def given(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """The arguments of a call, ``(args, kwargs)``, in this world."""
        if takes_numbers(func):
            args, kwargs = with_numbers((args, kwargs), self.readings.use)
        elif takes_sizes(func):
            args, kwargs = with_numbers((args, kwargs), self.readings.guess)
        elif func in INDEXED and not isinstance(args[1], int):  # slices up to a length
            args = (args[0], with_numbers(args[1], self.readings.guess), *args[2:])
        return self.there((args, kwargs), written)

    def call(self, func: Any, args: Any, kwargs: Any, own: Any, output: Any, *, drawn: bool) -> None:  # noqa: ARG002
        """Call ``func`` with its own arguments; ``output`` is what it returned for the real ones. drawn: whether it
        draws random numbers, which are the same.
        """
        self.note(output, func(*own[0], **own[1]), drawn=drawn)

    def note(self, here: Any, there: Any, *, drawn: bool = False) -> None:
        """That what came out here is this there; drawn: by random numbers, which are the same for the same shapes."""
        ours, theirs = tensors_in(here), tensors_in(there)
        if len(ours) != len(theirs):
            self.lose("a function returned another number of tensors")
        elif drawn and any(t.shape != shadow.shape for t, shadow in zip(ours, theirs, strict=True)):
            self.lose("random numbers are drawn, of another shape")
        else:
            for t, shadow in zip(ours, theirs, strict=True):
                if t is not shadow:
                    self.shadows[t] = shadow


def call_in_all(
    worlds: Sequence[World], func: Callable[..., Any], args: Any, kwargs: Any, written: list[Tensor]
) -> Any:
    """``func(*args, **kwargs)``, here and in every world that knows one of its arguments, with the same random numbers.

    written: the tensors that the call changes in place.
    """
    given: list[tuple[World, Any]] = []
    for world in worlds:
        with world.may_be_lost(function_name(func)):
            given.append((world, world.given(func, args, kwargs, written)))
    before = RandomState()
    output = func(*args, **kwargs)
    after = RandomState() if before.has_moved() else None
    drawn = after is not None
    for world, own in given:
        if drawn:
            before.restore()
        with world.may_be_lost(function_name(func)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said of the user's own call was said
            if not world.lost:
                world.call(func, args, kwargs, own, output, drawn=drawn)
    if after is not None:
        after.restore()
    return output


def gradient_in_all(worlds: Sequence[World], func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``torch.autograd.grad``, here and in every world that knows one of its arguments."""
    there = []
    for world in worlds:  # before the graph here is used up
        with world.may_be_lost(function_name(func)):
            own_args, own_kwargs = world.there((args, kwargs))
            there.append((world, func(*own_args, **{**own_kwargs, "retain_graph": True})))
    output = func(*args, **kwargs)
    for world, found in there:
        world.note(output, found)
    return output


def read_in_all(worlds: Sequence[World], func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``, a number that Python is told, and what it is in every world."""
    output, there = func(*args, **kwargs), {}
    for world in worlds:
        with contextlib.suppress(Exception):  # not one number there
            own_args, own_kwargs = world.there((args, kwargs))
            there[world.readings] = func(*own_args, **own_kwargs)
    return read(func, output, there)
