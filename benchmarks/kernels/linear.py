"""``linear``: an einsum for all examples, and the matrix product of the ordinary gradient."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, batches, factors, random, squares
from benchmarks.kernels.shapes import BATCHES, LINEARS, Batch, Linear
from dpfast.kernels import linear


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    for layer, batch, dtype in batches(LINEARS, of):
        yield from _cases(layer, batch, dtype)


def _cases(layer: Linear, batch: Batch, dtype: str) -> Iterator[Case]:
    b, m, w = batch.examples, batch.augmult * layer.positions, factors(batch.examples)
    product = 2.0 * b * m * layer.inputs * layer.outputs
    case = partial(
        Case,
        shape=f"{layer.name}, {batch.name}",
        dtype=dtype,
        inputs=lambda: random((b, m, layer.inputs), (b, m, layer.outputs)),
        ordinary=ordinary,
        count=layer.count,
        work={"examples": b, "rows": m, "inputs": layer.inputs, "outputs": layer.outputs, "pixels": layer.inputs},
    )
    backend = batch.backend
    norms = {"einsum": lambda a, g: squares(by_einsum(a, g))}
    sums = {"scaled rows": lambda a, g: ordinary(a, g * w.to(g.dtype).view(-1, 1, 1))}
    yield case(
        op="linear.per_example_grads",
        ours=partial(linear.per_example_grads, backend=backend),
        ways={"einsum": grads},
        flops=product,
    )
    yield case(op="linear.sq_norms", ours=partial(linear.sq_norms, backend=backend), ways=norms, flops=product)
    yield case(
        op="linear.gram_sq_norms",
        ours=partial(linear.gram_sq_norms, backend=backend),
        ways={**norms, "Gram": by_gram},
        flops=1.0 * b * m * (m + 1) * (layer.inputs + layer.outputs),
        bounded=True,
    )
    yield case(
        op="linear.clipped_sum",
        ours=lambda a, g: linear.clipped_sum(a, g, w, backend=backend),
        ways=sums,
        flops=product,
    )
    yield case(op="linear.weighted_sum", ours=lambda a, g: linear.weighted_sum(a, g, w), ways=sums, flops=product)


def ordinary(a: Tensor, g: Tensor) -> Tensor:
    return g.flatten(0, 1).mT @ a.flatten(0, 1)


def by_einsum(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bmd,bmp->bpd", a, g)


def grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    found = by_einsum(a, g)
    return found, squares(found)


def by_gram(a: Tensor, g: Tensor) -> Tensor:
    return ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
