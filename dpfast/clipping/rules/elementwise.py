"""Rules for what is computed entry by entry, with broadcasting, and for joining tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import IsTracked, Rule, Terms, Use
from dpfast.clipping.terms import Stored
from dpfast.kernels.precision import accumulation_dtype


def reduce_to(rows: Rows, g: Tensor, shape: Sequence[int]) -> Tensor:
    """``[B, *shape]``: per example, the sum of the output's gradient ``g`` over what ``shape`` was broadcast along."""
    aligned = (1,) * (g.ndim - len(shape)) + tuple(shape)
    spans_rows = aligned[rows.dim] != 1
    if spans_rows:  # each row has its own entry: only the rows of the example itself are not zero
        each = torch.arange(rows.examples, device=g.device).view(-1, *[1] * g.ndim)
        per_example = torch.where(rows.owner(g) == each, g.to(accumulation_dtype(g)), 0)
    else:
        per_example = rows.split(g).sum(1, dtype=accumulation_dtype(g)).unsqueeze(1 + rows.dim)
    over = [1 + d for d, size in enumerate(aligned) if size == 1 and per_example.shape[1 + d] != 1]
    summed = per_example.sum(over, keepdim=True) if over else per_example
    return summed.reshape(rows.examples, *shape)


@dataclass(frozen=True)
class Partial:
    """A derivative by one operand: of the operands at the places ``needs``."""

    of: Callable[..., Any]
    needs: tuple[int, ...] = ()


def _entrywise(*partials: Partial, in_place: bool = False) -> Rule:
    """The rule of a function of as many operands; in_place: it writes over the first."""

    def rule(is_tracked: IsTracked, *operands: Any) -> Use | None:
        if len(operands) != len(partials) or (in_place and is_tracked(operands[0])):
            return None
        targets = {i: is_tracked.base(operand) for i, operand in enumerate(operands) if is_tracked(operand)}
        needed = sorted({place for i in targets for place in partials[i].needs})
        data = [i for i in needed if isinstance(operands[i], Tensor) and i not in targets]
        fixed = {i: operands[i].detach() if i in targets else operands[i] for i in needed if i not in data}
        overwritten = in_place and 0 in data
        saved = tuple(operands[i].detach().clone() if overwritten and i == 0 else operands[i] for i in data)

        def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
            g = g.to(accumulation_dtype(g))
            values = {i: _wide(v, g.dtype) for i, v in (fixed | dict(zip(data, saved, strict=True))).items()}
            found = []
            for i, target in targets.items():
                partial = partials[i].of(*(values[place] for place in partials[i].needs))
                found.append((target, Stored(reduce_to(rows, _times(g, partial), target.shape))))
            return found

        return Use(saved, terms)

    return rule


def _wide(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype != torch.bool else value


def _times(g: Tensor, partial: Any) -> Tensor:
    """``g * partial``; a condition chooses, so that what was not chosen leaves no 0 * inf."""
    if isinstance(partial, Tensor) and partial.dtype == torch.bool:
        return torch.where(partial, g, 0)
    return g if isinstance(partial, int) and partial == 1 else g * partial


_ONE = Partial(lambda: 1)
_MULTIPLY = Partial(lambda right: right, (1,)), Partial(lambda left: left, (0,))
_DIVIDE = Partial(lambda below: 1 / below, (1,)), Partial(lambda above, below: -above / below.square(), (0, 1))
_LERP = (
    Partial(lambda weight: 1 - weight, (2,)),
    Partial(lambda weight: weight, (2,)),
    Partial(lambda start, end: end - start, (0, 1)),
)
multiply, multiply_in_place = _entrywise(*_MULTIPLY), _entrywise(*_MULTIPLY, in_place=True)
divide, divide_in_place = _entrywise(*_DIVIDE), _entrywise(*_DIVIDE, in_place=True)
divide_reflected = _entrywise(*(Partial(p.of, tuple(1 - i for i in p.needs)) for p in reversed(_DIVIDE)))
lerp, lerp_in_place = _entrywise(*_LERP), _entrywise(*_LERP, in_place=True)
where = _entrywise(_ONE, Partial(lambda chosen: chosen, (0,)), Partial(lambda chosen: ~chosen, (0,)))


def where_method(is_tracked: IsTracked, self: Any, condition: Any, other: Any) -> Any:
    return where(is_tracked, condition, self, other)


def masked_fill(is_tracked: IsTracked, input: Any, mask: Any, value: Any) -> Any:
    return where(is_tracked, mask, value, input)


def _additive(sign_left: float, sign_right: float) -> Rule:
    """Saves nothing."""

    def rule(is_tracked: IsTracked, left: Any, right: Any, *, alpha: float = 1) -> Use | None:
        if is_tracked(left) == is_tracked(right):
            return None
        scale = sign_left if is_tracked(left) else sign_right * alpha
        target = is_tracked.base(left if is_tracked(left) else right)

        def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
            reduced = reduce_to(rows, g, target.shape)
            return [(target, Stored(reduced if scale == 1 else scale * reduced))]

        return Use((), terms)

    return rule


add, subtract = _additive(1, 1), _additive(1, -1)


def subtract_reflected(is_tracked: IsTracked, left: Any, right: Any, *, alpha: float = 1) -> Any:
    """``right - alpha * left``."""
    return subtract(is_tracked, right, left, alpha=alpha)


def addcmul(is_tracked: IsTracked, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    """``input + value * tensor1 * tensor2``."""
    by = Partial(lambda other: value * other, (2,)), Partial(lambda other: value * other, (1,))
    return _entrywise(_ONE, *by)(is_tracked, input, tensor1, tensor2)


def prelu(is_tracked: IsTracked, input: Tensor, weight: Tensor) -> Use | None:
    """One slope, or one for each channel (dimension 1)."""
    if is_tracked(input) or input.ndim < 2:
        return None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        dtype = accumulation_dtype(g)
        by_channel = (weight.numel(), *[1] * (g.ndim - 2))
        grads = reduce_to(rows, g.to(dtype) * saved[0].to(dtype).clamp(max=0), by_channel)
        return [(weight, Stored(grads.reshape(rows.examples, *weight.shape)))]

    return Use((input,), terms, (0,))


# Joining


def cat(is_tracked: IsTracked, tensors: Sequence[Tensor], dim: int = 0) -> Use | None:
    """Class tokens and learned keys beside the tokens of the data."""
    ndim = tensors[0].ndim
    if any(t.ndim != ndim for t in tensors):  # an empty vector may stand beside anything
        return None
    dim %= ndim
    sizes = [t.shape[dim] for t in tensors]
    targets = _places(is_tracked, tensors)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        parts = g.split(sizes, dim)
        return [(target, Stored(reduce_to(rows, parts[i], target.shape))) for i, target in targets]

    return Use((), terms, tuple(d for d in range(ndim) if d != dim))


def stack(is_tracked: IsTracked, tensors: Sequence[Tensor], dim: int = 0) -> Use | None:
    dims = tensors[0].ndim + 1
    dim %= dims
    targets = _places(is_tracked, tensors)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        parts, own = g.unbind(dim), Rows(rows.examples, rows.dim - (rows.dim > dim))
        return [(target, Stored(reduce_to(own, parts[i], target.shape))) for i, target in targets]

    return Use((), terms, tuple(d for d in range(dims) if d != dim))


def _places(is_tracked: IsTracked, tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    return [(i, is_tracked.base(t)) for i, t in enumerate(tensors) if is_tracked(t)]
