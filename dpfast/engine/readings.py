"""Numbers that leave torch for Python and come back: what they are in other worlds.

What ``item()``, ``tolist()``, ``shape`` and the like return is followed through Python's arithmetic where it is another
number in some world: an ``int`` or ``float`` that knows what it is there. ``len()``, ``int()`` and ``float()`` return
plain numbers, whatever one does; these are guessed at by their value where they come back.
"""

import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dpfast.clipping.functions import NUMBERS
from dpfast.clipping.trees import function_name, leaves

_BY_VALUE = frozenset((Tensor.__len__, Tensor.__float__, Tensor.__int__, Tensor.__index__))
READ = _BY_VALUE | {
    *(Tensor.item, Tensor.tolist, Tensor.size, Tensor.numel, Tensor.nelement, torch.numel),
    Tensor.shape.__get__,  # type: ignore[attr-defined]
}
_OF_TORCH_SAVE = 2  # its protocol of pickle, which is nobody else's default
_MOST = 4096  # numbers of one list that are followed
_TAKE_NUMBERS = frozenset(
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "subtract", "multiply", "divide")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)
_TAKE_SIZES = frozenset(
    ("view", "reshape", "expand", "unflatten", "narrow", "repeat", "new_zeros", "new_ones", "new_full", "new_empty")
)
_SMALL = 2  # whole numbers up to here stand in every program
_SHORT = 8  # characters of a fraction that a person may have written


class Readings:
    """What was read in one world: numbers know by it what they are there, plain ones are guessed at by their value.

    earlier: those of worlds before, of which this one is what is left.
    """

    def __init__(self, earlier: "Sequence[Readings]" = ()) -> None:
        self.family: list[Readings] = [self, *(one for before in earlier for one in before.family if one.followed)]
        self.is_open = True  # whether what Python computes of its numbers is followed: while the batch is there
        self.followed: weakref.WeakSet[_There] = weakref.WeakSet()  # of the numbers that live
        self.used: set[float] = set()  # numbers that were guessed at, and have come back
        self._there: dict[float, float | None] = {}  # None: now this, now that

    @property
    def lives(self) -> bool:
        """Whether numbers live that are others in this world."""
        return any(one.followed for one in self.family)

    def value_of(self, number: Any) -> Any:
        """What a number is there."""
        if not isinstance(number, Followed):
            return number
        return next((number.there[one] for one in self.family if one in number.there), _plain(number))

    def differ(self, value: Any) -> bool:
        """Whether some number in a tree is known to be another there."""
        return self.lives and any(isinstance(n, Followed) and self.value_of(n) != n for n in leaves(value))

    def note(self, here: Any, there: Any) -> None:
        """That a plain number is another one there."""
        if is_number(here) and is_number(there):
            known = self._there.setdefault(here, there)
            self._there[here] = known if known == there else None

    def guess(self, number: Any) -> Any:
        """What a plain number is there: itself, for all that is known."""
        if not self._there or isinstance(number, Followed) or not is_number(number):
            return number
        other = self._there.get(number)
        if other is not None and _is_telling(number):
            return other
        whole = round(1 / number) if 0 < number < 1 else 0
        other = self._there.get(whole) if whole and 1 / whole == number else None
        return 1 / other if other and _is_telling(whole) else number

    def use(self, number: Any) -> Any:
        """``guess``, for a computation that what is shown then depends on."""
        other = self.guess(number)
        if other != number:
            self.used.add(number)
        return other

    def guesses(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a tensor is made of plain numbers that may be others there."""
        return bool(self._there) and func in NUMBERS and any(self.guess(n) != n for n in numbers_in((args, kwargs)))


class _There(dict[Readings, float]):
    """What a number is in worlds."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Followed:
    """A number that is another one in some worlds."""

    there: "_There"

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = _plain(self)
        if protocol == _OF_TORCH_SAVE:  # whose files are loaded by `weights_only`, to which no number has a class
            return torch.tensor(plain, dtype=torch.int64 if _kind(self) is int else torch.float64).__reduce_ex__(
                protocol
            )
        return _kind(self), (plain,)

    def __copy__(self) -> Any:
        return _plain(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return _plain(self)

    def __int__(self) -> int:
        return cast(int, self._noted(int))

    def __float__(self) -> float:
        return self._noted(float)

    def _noted(self, kind: Callable[[Any], float]) -> float:
        plain = kind(_plain(self))
        for world, value in self.there.items():
            world.note(plain, kind(value) if math.isfinite(value) else value)
        return plain


class _Whole(Followed, int):
    pass


class _Fraction(Followed, float):
    pass


def _computed(compute: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    """``compute`` for numbers, here and in every world that one of them knows."""

    def method(*numbers: Any) -> Any:
        if not all(map(is_number, numbers)):
            return NotImplemented
        numbers = numbers[::-1] if reflected else numbers
        here = compute(*map(_plain, numbers))
        known = {world for number in numbers if isinstance(number, Followed) for world in number.there}
        worlds = [world for world in known if world.is_open]
        return _followed(here, {world: _tried(compute, [world.value_of(n) for n in numbers]) for world in worlds})

    return method


def _tried(compute: Callable[..., Any], numbers: list[float]) -> float:
    try:
        return cast(float, compute(*numbers))
    except (ArithmeticError, ValueError):
        return math.nan


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Followed, f"__{_name}__", _computed(getattr(operator, _name)))
    setattr(Followed, f"__r{_name}__", _computed(getattr(operator, _name), reflected=True))
for _one in (operator.neg, operator.pos, abs, round, math.floor, math.ceil):
    setattr(Followed, f"__{_one.__name__}__", _computed(_one))


def takes_numbers(func: Any) -> bool:
    """Whether a function computes with numbers among its arguments, or makes a tensor of them."""
    return func in NUMBERS or function_name(func) in _TAKE_NUMBERS


def takes_sizes(func: Any) -> bool:
    """Whether numbers among a function's arguments are sizes of its result, which do not fit where they are wrong."""
    return function_name(func) in _TAKE_SIZES


def is_number(value: Any) -> bool:
    """Whether it is one of Python's, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers_in(value: Any) -> Iterator[float]:
    """Those of a tree."""
    return (leaf for leaf in leaves(value) if is_number(leaf))


def with_numbers(value: Any, of: Callable[[Any], Any]) -> Any:
    """The same arguments with other numbers: in lists, tuples, dicts, slices."""
    if isinstance(value, list | tuple):
        items = [with_numbers(item, of) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: with_numbers(item, of) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(with_numbers(part, of) for part in (value.start, value.stop, value.step)))
    return of(value) if is_number(value) else value


def read(func: Any, here: Any, there: Mapping[Readings, Any]) -> Any:
    """What ``func``, of ``READ``, returned, for the user's code."""
    if func not in _BY_VALUE:
        return _followed_in(here, there) if not isinstance(here, list) or _size(here) <= _MOST else here
    for world, value in there.items():
        world.note(here, value)
    return here


def _followed_in(here: Any, there: Mapping[Readings, Any]) -> Any:
    if is_number(here):
        return _followed(here, there)
    if not isinstance(here, list | tuple):
        return here
    alike = {world: value for world, value in there.items() if len(value) == len(here)}
    return type(here)(_followed_in(item, {w: value[i] for w, value in alike.items()}) for i, item in enumerate(here))


def _followed(here: Any, there: Mapping[Readings, Any]) -> Any:
    others = {world: value for world, value in there.items() if is_number(value) and value != here}
    if not others or not is_number(here):
        return here
    number = _Whole(here) if isinstance(here, int) else _Fraction(here)
    number.there = _There(others)
    for world in others:
        world.followed.add(number.there)
    return number


def _kind(number: Any) -> type:
    return int if isinstance(number, int) else float


def _plain(number: Any) -> Any:
    if not isinstance(number, Followed):
        return number
    return int.__int__(number) if isinstance(number, int) else float.__float__(cast(float, number))


def _size(value: Any) -> int:
    return sum(map(_size, value)) if isinstance(value, list) else 1


def _is_telling(number: float) -> bool:
    return abs(number) > _SMALL if float(number).is_integer() else len(repr(number)) > _SHORT
