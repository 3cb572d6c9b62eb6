"""``affine``: products and sums. Its shapes are those of group norms, whose x-hat and g it is given."""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from benchmarks.kernels.case import Case, batches, random
from benchmarks.kernels.shapes import BATCHES, GROUP_NORMS, Batch
from dpfast.kernels import affine


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    for layer, batch, dtype in batches(GROUP_NORMS, of):
        size = (batch.examples, batch.augmult, layer.channels, layer.space**2)
        case = partial(Case, shape=f"{layer.name}, {batch.name}", dtype=dtype, count=layer.count)
        inputs = partial(laid_out, channels_last=batch.channels_last)
        yield case(
            op="affine.affine_grads",
            inputs=partial(inputs, size, size),
            ours=partial(affine.affine_grads, backend=batch.backend),
            ways={"product, sum": summed},
            ordinary=lambda a, g: ((a * g).sum((0, 1, 3)), g.sum((0, 1, 3))),
        )
        yield case(
            op="affine.bias_grads",
            inputs=partial(inputs, size),
            ours=partial(affine.bias_grads, backend=batch.backend),
            ways={"sum": lambda g: g.sum((1, 3))},
            ordinary=lambda g: g.sum((0, 1, 3)),
        )


def laid_out(*sizes: tuple[int, ...], channels_last: bool) -> tuple[Tensor, ...]:
    """``[B, M, C, S]``, of images whose channels lie next to each other."""
    found = random(*sizes)
    return tuple(t.mT.contiguous().mT for t in found) if channels_last else found


def summed(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (a * g).sum((1, 3)), g.sum((1, 3))
