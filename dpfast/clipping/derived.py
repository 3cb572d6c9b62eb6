"""Tensors computed from parameters and constants alone, and those among them that only move and scale entries.

A weight that was cast, transposed, reshaped, cut into parts or multiplied by a number before its use is one parameter
in other clothes: its per-example gradients keep the form they have (factors, a Gram), and only their clipped sum is
brought back to the parameter. All other derived tensors (standardised, joined) are materialised and pulled back.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dpfast.clipping.functions import storage
from dpfast.clipping.trees import tensors_in

Move = Callable[[Tensor], Tensor]


def _named(*names: str) -> frozenset[Any]:
    """The functions of these names of ``torch`` and of ``Tensor``."""
    return frozenset(getattr(home, name) for name in names for home in (torch, Tensor) if hasattr(home, name))


_RESHAPES = _named("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as", "reshape_as")
_MOVES = _named(
    *("t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "flip"),
    *("narrow", "select", "chunk", "split", "tensor_split", "unbind"),
) | {getattr(Tensor, name).__get__ for name in ("T", "mT")}
_CASTS = _named("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")
_PRODUCTS = _named("mul", "multiply", "__mul__", "__rmul__")
_QUOTIENTS = _named("div", "divide", "true_divide", "__truediv__")
_EXPANSIONS = _named("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
# Beyond, the gradient of a scaled weight may be so large or small that its squares overflow or vanish in float32.
SMALLEST_SCALE, LARGEST_SCALE = 1e-12, 1e6
_BASIC = (int, slice, type(None), type(Ellipsis))


class Chain(NamedTuple):
    """How a tensor is made of one parameter: entries moved, left out, cast, and all multiplied by ``scale``.

    No entry stands in two places, so a gradient G of the tensor is a gradient of the parameter of norm |scale| |G|.
    Casts are left out of ``moves``: sums are float32 at least, and stay so on their way back. within: a view of the
    parameter that holds all of the entries.
    """

    parameter: Tensor
    within: Tensor
    moves: tuple[Move, ...] = ()
    scale: float = 1.0

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Self:
        """The parameter itself."""
        return cls(parameter, parameter)

    @property
    def is_identity(self) -> bool:
        return not self.moves and self.scale == 1

    def then(self, output: Tensor, move: Move | None = None, scale: float = 1.0) -> "Chain":
        shares_memory = storage(output) == storage(self.parameter)
        moves = self.moves if move is None else (*self.moves, move)
        return Chain(self.parameter, output if shares_memory else self.within, moves, self.scale * scale)

    def pull_back(self, total: Tensor) -> Tensor:
        """The gradient of the parameter that ``total``, one of the tensor, is; in the type of ``total``."""
        if self.moves:
            with torch.enable_grad():
                start = self.parameter.detach().to(total.dtype).requires_grad_()
                end: Tensor = start
                for move in self.moves:
                    end = move(end)
                (total,) = torch.autograd.grad(end, start, total)
        return total if self.scale == 1 else self.scale * total


class Tracked(NamedTuple):
    """A tracked tensor, and the names of the parameters it is made of.

    version: that of its numbers when ``chain`` and ``base`` were true. base: what it was expanded (repeated) from.
    """

    tensor: Tensor
    names: tuple[str, ...]
    version: int = 0
    chain: Chain | None = None
    base: Tensor | None = None

    @property
    def unchanged(self) -> bool:
        """A parameter is itself whatever its numbers."""
        is_parameter = self.chain is not None and self.chain.parameter is self.tensor
        return is_parameter or self.tensor._version == self.version


class TrackedTensors(dict[int, Tracked]):
    """Tracked tensors by their id; keeps them alive, so that their ids stay their own."""

    def __call__(self, value: Any) -> bool:
        """Whether it is one of them."""
        return isinstance(value, Tensor) and id(value) in self

    def base(self, t: Tensor) -> Tensor:
        """What the tracked ``t`` was expanded from, to which its gradient may be summed; or itself."""
        known = self[id(t)]
        return known.base if known.base is not None and known.unchanged else t

    def rename(self, written: Tensor, names: Iterable[str]) -> None:
        """After a change in place: whatever shares the memory is made of these parameters, too, and by no chain."""
        place = storage(written)
        for key, known in list(self.items()):
            if storage(known.tensor) == place:
                self[key] = Tracked(known.tensor, tuple(dict.fromkeys((*known.names, *names))), known.version)


def derive(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tracked | None, output: Tensor, index: int
) -> tuple[Chain | None, Tensor | None]:
    """Chain and base of ``output``, the ``index``-th tensor of a call whose only tracked argument was ``source``."""
    if source is None or not args or args[0] is not source.tensor or not source.unchanged:
        return None, None
    if func in _EXPANSIONS and _is_expansion(source.tensor, output):
        return None, source.tensor
    if source.chain is None or not output.is_floating_point():
        return None, None
    return _next(func, args, kwargs, source.chain, output, index), None


def _next(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chain: Chain, output: Tensor, index: int
) -> Chain | None:
    tensor: Tensor = args[0]
    if func in _CASTS:
        return chain.then(output) if output.device == tensor.device and output.shape == tensor.shape else None
    if output.dtype != tensor.dtype:  # the same bits taken for other numbers, or a product in another type
        return None
    if func in _RESHAPES:
        shape = output.shape
        return chain.then(output, lambda t: t.reshape(shape))
    rest, n = args[1:], len(tensors_in((args, kwargs)))
    if n == 1 and (func in _MOVES or (func is Tensor.__getitem__ and _is_basic(args[1]))):
        return chain.then(output, lambda t: tensors_in(func(t, *rest, **kwargs))[index])
    scale = None if kwargs else _scale(func, rest)
    if scale is None or (scale and not SMALLEST_SCALE <= abs(chain.scale * scale) <= LARGEST_SCALE):
        return None
    return chain.then(output, scale=scale)


def _scale(func: Any, rest: tuple[Any, ...]) -> float | None:
    """The number that a call multiplies its first argument by."""
    if func in (torch.neg, Tensor.neg, Tensor.__neg__):
        return -1.0
    if len(rest) != 1 or not isinstance(rest[0], int | float):
        return None
    number = float(rest[0])
    if func in _QUOTIENTS:
        number = 1 / number if number else math.inf
    return number if (func in _PRODUCTS or func in _QUOTIENTS) and math.isfinite(number) else None


def _is_basic(index: Any) -> bool:
    """Whether it takes each entry at most once, without a copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, _BASIC) and not isinstance(part, bool) for part in parts)


def _is_expansion(t: Tensor, output: Tensor) -> bool:
    """Whether ``output`` is ``t`` broadcast to a larger shape."""
    if output.ndim < t.ndim or not t.numel():
        return False
    aligned = output.shape[output.ndim - t.ndim :]
    return all(size in (1, larger) for size, larger in zip(t.shape, aligned, strict=True))


def _span(t: Tensor) -> tuple[int, int]:
    """First and last place in memory."""
    start = t.storage_offset()
    return int(start), int(start + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)))


def direct_uses(tracked: Iterable[Tracked], times_used: Callable[[int], int]) -> dict[int, tuple[str, Chain]]:
    """Of the used tensors, those whose terms need not be summed per example, with their parameter and chain.

    A parameter must have reached its uses through chains alone, each tensor used once and all of them without a common
    entry: then the squared norms of its gradient's parts add up.
    """
    by_name: dict[str, list[Tracked]] = {}
    for known in tracked:
        if times_used(id(known.tensor)):
            for name in known.names:
                by_name.setdefault(name, []).append(known)
    direct = {}
    for name, used in by_name.items():
        if len(used) == 1:
            (known,) = used
            if known.chain is not None and known.unchanged and times_used(id(known.tensor)) == 1:
                direct[id(known.tensor)] = name, known.chain
            continue
        chains = [known.chain for known in used if known.chain is not None and known.unchanged]
        once = all(times_used(id(known.tensor)) == 1 for known in used)
        if once and len(chains) == len(used) and _apart([chain.within for chain in chains]):
            direct.update({id(known.tensor): (name, chain) for known, chain in zip(used, chains, strict=True)})
    return direct


def _apart(views: Sequence[Tensor]) -> bool:
    """Whether no place in memory can belong to two of them."""
    ordered = sorted(map(_span, views))
    return all(end < start for (_, end), (start, _) in pairwise(ordered))
