"""``embedding``: rows added to one table for each example, a one-hot product, and the ordinary backward."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, batches, factors, random, squares
from benchmarks.kernels.shapes import BATCHES, EMBEDDINGS, Batch, Embedding
from dpfast.kernels import embedding


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    for layer, batch, dtype in batches(EMBEDDINGS, of):
        yield from _cases(layer, batch, dtype)


def _cases(layer: Embedding, batch: Batch, dtype: str) -> Iterator[Case]:
    v, w = layer.table_rows, factors(batch.examples)

    def inputs() -> tuple[Tensor, Tensor]:
        (g,) = random((batch.examples, batch.augmult, layer.features))
        return torch.arange(batch.rows).remainder(v).view(g.shape[:2]), g

    case = partial(
        Case,
        shape=f"{layer.name}, {batch.name}",
        dtype=dtype,
        inputs=inputs,
        ordinary=lambda index, g: ordinary(index, g, v),
    )
    grads = {
        "index_add": lambda index, g: by_adding(index, g, v),
        "one-hot einsum": lambda index, g: by_one_hot(index, g, v),
    }
    norms = {name: lambda index, g, way=way: squares(way(index, g)) for name, way in grads.items()}
    sums = {"scaled rows": lambda index, g: ordinary(index, g * w.to(g.dtype).view(-1, 1, 1), v)}
    yield case(
        op="embedding.per_example_grads", ours=lambda index, g: embedding.per_example_grads(index, g, v), ways=grads
    )
    yield case(op="embedding.sq_norms", ours=lambda index, g: embedding.sq_norms(index, g, v), ways=norms)
    yield case(op="embedding.gram_sq_norms", ours=embedding.gram_sq_norms, ways=norms, bounded=True)
    yield case(op="embedding.clipped_sum", ours=lambda index, g: embedding.clipped_sum(index, g, v, w), ways=sums)
    yield case(op="embedding.weighted_sum", ours=lambda index, g: embedding.weighted_sum(index, g, v, w), ways=sums)


def ordinary(index: Tensor, g: Tensor, rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(g, index, rows, -1, False)


def by_adding(index: Tensor, g: Tensor, rows: int) -> Tensor:
    examples = len(index)
    own = index + rows * torch.arange(examples, device=index.device).unsqueeze(1)
    tables = g.new_zeros(examples * rows, g.shape[-1])
    return tables.index_add_(0, own.flatten(), g.flatten(0, 1)).unflatten(0, (examples, rows))


def by_one_hot(index: Tensor, g: Tensor, rows: int) -> Tensor:
    return torch.einsum("bmv,bmd->bvd", F.one_hot(index, rows).to(g.dtype), g)
