"""``affine``: products and sums. Its shapes are those of group norms, whose x-hat and g it is given."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from benchmarks.kernels.case import Case, batches, random
from benchmarks.kernels.shapes import GROUP_NORMS
from dpfast.kernels import affine


def cases() -> Iterator[Case]:
    for layer, batch, dtype in batches(GROUP_NORMS):
        size = (batch.examples, batch.augmult, layer.channels, layer.space**2)
        case = partial(Case, shape=f"{layer.name}, {batch.name}", dtype=dtype)
        yield case(
            op="affine.affine_grads",
            inputs=partial(random, size, size),
            ours=affine.affine_grads,
            ways={"product, sum": summed},
            ordinary=lambda a, g: ((a * g).sum((0, 1, 3)), g.sum((0, 1, 3))),
        )
        yield case(
            op="affine.bias_grads",
            inputs=partial(random, size),
            ours=affine.bias_grads,
            ways={"sum": lambda g: g.sum((1, 3))},
            ordinary=lambda g: g.sum((0, 1, 3)),
        )


def summed(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (a * g).sum((1, 3)), g.sum((1, 3))
