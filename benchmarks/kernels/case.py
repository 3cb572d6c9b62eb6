"""One op at one shape: the op, what a user of torch would write for the same result, and the ordinary gradient."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.shapes import Batch

Function = Callable[..., Any]
ROUNDINGS = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """op: its name in ``dpfast.kernels``. inputs: made in float32, given to all functions in ``dtype``.

    ways: of getting the same result with torch; the first of them in float64 is what is exact. ordinary: the gradient
    of a non-private step, which takes the place of the op there. flops: of products that cannot be avoided; 0 where
    there are none. bounded: the op returns a bound on its error as its last value. count: how many layers of the model
    have this shape. work: sizes of ``dpfast.kernels.cost.Work``, of ops whose time it predicts.
    """

    op: str
    shape: str
    dtype: str
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Function
    ways: Mapping[str, Function]
    ordinary: Function | None = None
    flops: float = 0.0
    bounded: bool = False
    count: int = 1
    work: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}, {self.dtype}"

    @property
    def id(self) -> str:
        """The same without what ``pytest -k`` cannot read: ``conv.sq_norms-64-64-3x3-32-B8-K4-float32``."""
        return re.sub(r"[^\w.]+", "-", self.name.replace("=", ""))

    def arguments(self, held: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """``inputs`` rounded to the dtype; ``held`` in another one if given."""
        dtype = getattr(torch, self.dtype)
        return tuple(t.to(dtype).to(held or dtype) if t.is_floating_point() else t for t in self.inputs())


def batches(model_layers: Mapping[str, tuple[Any, ...]], of: Sequence[Batch]) -> Iterator[tuple[Any, Batch, str]]:
    """Every layer of each model with the batches and dtypes of that model."""
    for batch in of:
        for layer in model_layers.get(batch.model, ()):
            for dtype in batch.dtypes:
                yield layer, batch, dtype


def random(*shapes: tuple[int, ...], channels_last: bool = False) -> tuple[Tensor, ...]:
    """On torch's default device. channels_last: of what has four dimensions."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return tuple(t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t for t in found)


def factors(examples: int) -> Tensor:
    """Clip factors ``w [B]``."""
    return torch.linspace(0.1, 1, examples)


def squares(grads: Tensor) -> Tensor:
    """``|G_i|^2 [B]``, as a user would write it."""
    return grads.flatten(1).square().sum(1)


@dataclass(frozen=True)
class Passed:
    """Relative errors against float64, of the op and of torch in float32; bytes that are read and written.

    excess: the error over what the gate allows.
    """

    error: float
    error_of_torch: float
    bytes: int
    excess: float


def gate(case: Case) -> Passed:
    """``compare``, and what errs by more than allowed does not pass.

    Raises:
        AssertionError: the op is wrong, or a way of torch computes another quantity.
    """
    passed = compare(case)
    assert passed.excess <= 1, f"{case.name}: an error of {passed.error:.1e}, {passed.excess:.3g} times what is allowed"
    return passed


def compare(case: Case) -> Passed:
    """The 2x rule: an error of at most twice that of torch in float32, in which every dtype is summed, plus one
    rounding of the result's dtype, or ROUNDINGS.

    A Gram has to keep to its own bound instead.

    Raises:
        AssertionError: a way of torch computes another quantity.
    """
    first, arguments = next(iter(case.ways.values())), case.arguments()
    exact = _tensors(first(*case.arguments(torch.float64)))
    plain = [_relative(x, y) for x, y in zip(_tensors(first(*case.arguments(torch.float32))), exact, strict=True)]
    results = _tensors(case.ours(*arguments))
    got, bound = (results[:-1], results[-1]) if case.bounded else (results, None)
    errors = [_relative(x, y) for x, y in zip(got, exact, strict=True)]
    if bound is not None:
        excess = [((got[0] - exact[0]).abs() / bound).max().item()]
    else:
        limits = [
            2 * theirs + max(ROUNDINGS, torch.finfo(x.dtype).eps / 2) for theirs, x in zip(plain, got, strict=True)
        ]
        excess = [x / y for x, y in zip(errors, limits, strict=True)]
    for name, way in case.ways.items():
        for x, y in zip(_tensors(way(*arguments)), exact, strict=True):
            # Torch's rounding in low precision is not judged: this tells another quantity from a rounded one.
            assert _relative(x, y) <= 5e-2, f"{case.name}: {name} computes something else"
    size = sum(t.nbytes for t in (*arguments, *results))
    return Passed(max(errors), max(plain), size, math.inf if any(map(math.isnan, excess)) else max(excess))


def _relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
