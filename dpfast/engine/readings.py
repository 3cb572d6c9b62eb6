"""Numbers that leave torch for Python and come back (``item()``, ``len``), recognised by their value."""

from typing import Any

from torch import Tensor

from dpfast.clipping.functions import ARITHMETIC
from dpfast.clipping.trees import function_name, leaves

SIZES = frozenset(
    (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__)  # type: ignore[attr-defined]
)
READ = SIZES | {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__index__}
_TAKE_NUMBERS = frozenset(
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "subtract", "multiply", "divide")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)
_SMALL = 2  # whole numbers up to here stand in every program
_SHORT = 8  # characters of a fraction that a person may have written


class Readings:
    """What numbers read out of tensors are in a world, where that is told by their value alone.

    Numbers that people write themselves (small whole ones, short fractions) are not recognised, nor what Python has
    computed from others, but for the reciprocal.
    """

    def __init__(self) -> None:
        self._there: dict[float, float | None] = {}  # None: now this, now that

    def note(self, here: Any, there: Any) -> None:
        """That the numbers in ``here`` are those of ``there``, in the same order."""
        ours, theirs = _numbers(here), _numbers(there)
        if len(ours) == len(theirs):
            for one, other in zip(ours, theirs, strict=True):
                known = self._there.setdefault(one, other)
                self._there[one] = known if known == other else None

    def differ(self, number: Any) -> bool:
        """Whether it is known to be another in the world."""
        return _is_number(number) and bool(self.there(number) != number)

    def there(self, number: Any) -> Any:
        """What an argument is in the world: itself, for all that is known."""
        if not self._there or not _is_number(number):
            return number
        other = self._there.get(number)
        if other is not None and _is_telling(number):
            return other
        whole = round(1 / number) if 0 < number < 1 else 0
        other = self._there.get(whole) if whole and 1 / whole == number else None
        return 1 / other if other and _is_telling(whole) else number

    def in_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the world, where ``func`` computes with numbers."""
        if not self._there or (func not in ARITHMETIC and function_name(func) not in _TAKE_NUMBERS):
            return args, kwargs
        return tuple(map(self.there, args)), {name: self.there(value) for name, value in kwargs.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> list[float]:
    return [number for number in leaves(value) if _is_number(number)]


def _is_telling(number: float) -> bool:
    return abs(number) > _SMALL if float(number).is_integer() else len(repr(number)) > _SHORT
