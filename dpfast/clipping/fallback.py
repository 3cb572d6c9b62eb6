"""Per-example gradients of any torch call with trainable arguments, by vector-Jacobian products: correct and slow."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem, refusal
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import Terms, Use
from dpfast.clipping.terms import Stored
from dpfast.clipping.trees import function_name, replace_tensors, tensors_in

CHUNK_ELEMENTS = 1 << 24  # masked copies of the output gradient that are alive at a time


def fallback_use(
    func: Any,
    args: Any,
    kwargs: Any,
    is_tracked: Callable[[Any], bool],
    *,
    names: tuple[str, ...] = (),
    result: int | None = None,
) -> Use | Problem:
    """A use whose terms come from ``torch.func.vjp`` of the call itself, one masked cotangent per example.

    names: of the parameters, for messages; result: which one, when the call returns several.
    """
    name = function_name(func)
    if kwargs.get("out") is not None or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return Problem(
            (),
            "a trainable parameter enters a change in place that dpfast has no rule for",
            "use the operation's out-of-place form (x = x.op(p), torch.where for indexed assignment)",
        )
    saved = tuple(tensors_in((args, kwargs)))
    targets = tuple({id(t): t for t in saved if is_tracked(t)}.values())

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        def call(*values: Tensor) -> Tensor:
            by_target = {id(t): v for t, v in zip(targets, values, strict=True)}
            order: Iterator[Tensor] = iter(saved)

            def substitute(original: Tensor) -> Tensor:
                current = next(order)
                return by_target.get(id(original), current)

            new_args, new_kwargs = replace_tensors((args, kwargs), substitute)
            output = func(*new_args, **new_kwargs)
            tensor: Tensor = output if result is None else output[result]
            return tensor

        try:
            grads = per_example_vjp(call, tuple(t.detach() for t in targets), g, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = f"{name}: torch has no vector-Jacobian product for it ({error})"
            cure = "write it with operations that torch.func can differentiate, or freeze it"
            raise refusal([Problem(names, what, cure)]) from error
        return [(t, Stored(grad)) for t, grad in zip(targets, grads, strict=True)]

    return Use(saved, terms)


def per_example_vjp(
    call: Callable[..., Tensor], values: tuple[Tensor, ...], g: Tensor, rows: Rows
) -> tuple[Tensor, ...]:
    """Gradients ``[B, *value.shape]`` of ``call`` for the cotangent ``g`` restricted to each example's rows."""
    vjp = torch.func.vjp(call, *values)[1]
    owner = rows.owner(g)

    def of(example: Tensor) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = vjp(torch.where(owner == example, g, 0))
        return grads

    examples = torch.arange(rows.examples, device=g.device)
    try:
        chunk = max(1, CHUNK_ELEMENTS // max(1, g.numel()))
        with warnings.catch_warnings():  # torch says which operations it maps slowly; the user knows that it is slow
            warnings.filterwarnings("ignore", message="There is a performance drop")
            mapped: tuple[Tensor, ...] = torch.func.vmap(of, chunk_size=chunk)(examples)
        return mapped
    except RuntimeError:  # an operation without a batching rule: one example after the other
        each = [of(example) for example in examples]
        return tuple(torch.stack(grads) for grads in zip(*each, strict=True))
