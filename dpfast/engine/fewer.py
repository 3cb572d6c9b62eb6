"""The world of fewer examples, which shows how losses are reduced over them."""

from typing import Any

from torch import Tensor, nn

from dpfast.clipping.functions import SELECTS_BY_INDEX
from dpfast.clipping.trees import TensorMap, function_name, tensors_in
from dpfast.engine.readings import Followed, numbers_in, takes_numbers
from dpfast.engine.shadows import World

_ADD = frozenset(("add", "__add__", "__radd__", "__iadd__", "add_"))


class Fewer(World):
    """The first half of the examples of the real batch, of ``examples`` with ``augmult`` rows each, and no others.

    Whatever has as many rows as the real batch has less there, too, and what is drawn at random is drawn once for both.
    Rows that a loop takes one by one are ``absent`` there, if they are others: they add nothing to a sum, and are left
    out of a list.
    """

    def __init__(self, examples: int, augmult: int) -> None:
        super().__init__(range(examples // 2))
        self.sizes = (examples * augmult, examples)
        self.absent = TensorMap()
        self.multiples_told: set[float] = set()  # of the sizes, by Python: plain numbers that a call is to compute with

    def part_of(self, t: Tensor) -> Tensor | None:
        """The rows that a tensor has there, if it has as many as the real batch: of one that is not computed from the
        batch, or in which rows do not meet.
        """
        if t.ndim == 0 or t.shape[0] not in self.sizes or isinstance(t, nn.Parameter):
            return None
        return self.rows(t, 0, t.shape[0] // self.sizes[-1])

    def knows(self, value: Any) -> bool:
        """Whether anything in it is another there, or absent."""
        return super().knows(value) or any(t in self.absent for t in tensors_in(value))

    def given(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """As any world, after a look at sizes."""
        if takes_numbers(func):
            plain = (n for n in numbers_in((args, kwargs)) if n and not isinstance(n, Followed))
            multiples = (n if abs(n) >= 1 else 1 / n for n in plain if self.readings.guess(n) == n)
            self.multiples_told |= {n / size for n in multiples for size in self.sizes if n % size == 0}
        if func in SELECTS_BY_INDEX and any(map(self._is_cut, _tables(tensors_in((args, kwargs))))):
            self.lose("a table has as many rows as the batch")  # an index beyond it would end a process on a GPU
        return super().given(func, _without(args, self.absent), kwargs, written)

    def _is_cut(self, t: Tensor) -> bool:
        return self.shadow_of(t) is None and self.part_of(t) is not None

    def call(self, func: Any, args: Any, kwargs: Any, own: Any, output: Any, *, drawn: bool) -> None:
        """As any world, without what is absent."""
        missing = [t for t in tensors_in((args, kwargs)) if t in self.absent]
        remaining = [t for t in tensors_in(own) if t not in self.absent]
        if drawn:
            self._note_parts(output)
        elif missing and function_name(func) in _ADD and remaining:
            self.note(output, remaining[0])
        elif func is Tensor.__setitem__ and missing:
            return
        elif any(t in self.absent for t in tensors_in(own)) or self._is_beyond(func, own):
            self.absent.update(tensors_in(output))
        else:
            super().call(func, args, kwargs, own, output, drawn=drawn)

    def _is_beyond(self, func: Any, own: Any) -> bool:
        """Whether a row is taken that is not there."""
        if func is not Tensor.__getitem__ or type(own[0][1]) is not int or not own[0][0].ndim:
            return False
        return bool(own[0][1] >= len(own[0][0]))

    def note(self, here: Any, there: Any, *, drawn: bool = False) -> None:
        """As any world; of more tensors here the last are absent there."""
        ours, theirs = tensors_in(here), tensors_in(there)
        self.absent.update(ours[len(theirs) :])
        super().note(ours[: len(theirs)], theirs, drawn=drawn)

    def _note_parts(self, here: Any) -> None:
        parts = [self.part_of(t) for t in tensors_in(here)]
        if any(part is None for part in parts):
            self.lose("random numbers are drawn")
        else:
            self.note(here, parts)


def _without(value: Any, absent: TensorMap) -> Any:
    """Arguments of a call, less what is absent of a list."""
    if type(value) is tuple:
        return tuple(_without(item, absent) for item in value)
    if type(value) is list:
        return [item for item in value if not (isinstance(item, Tensor) and item in absent)]
    return value


def _tables(given: list[Tensor]) -> list[Tensor]:
    """Of the tensors of ``SELECTS_BY_INDEX``, those of which some entries are picked."""
    return [*given[:1], *(t for t in given[1:2] if t.is_floating_point())]
