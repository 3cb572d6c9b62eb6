"""Per-example gradients of an embedding table, their squared norms and their clipped sum.

Shapes: ``index [B, M]`` rows of the table looked up, ``g [B, M, D]`` gradients of what was looked up; the gradient
of example i is ``[V, D]`` with ``G_i[v] = sum over m with index[i,m] = v of g[i,m]``.

    per_example_grads   writes B V D numbers
    sq_norms            of the rows that were looked up, B M D numbers: no table
    gram_sq_norms       B M^2 D FLOPs, no table, and a bound on the rounding error
    clipped_sum         of the very G_i that are measured, no table
    weighted_sum        one pass over g, which rounds w g: for what a Gram has measured
"""

import torch
from torch import Tensor

from dpfast.kernels.chunks import bytes_alive
from dpfast.kernels.embedding import reference
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register


def _fake_grads(index: Tensor, g: Tensor, rows: int) -> Tensor:
    return g.new_empty((index.shape[0], rows, g.shape[-1]), dtype=accumulation_dtype(g))


def _fake_sq_norms(index: Tensor, g: Tensor, _rows: int) -> Tensor:
    return g.new_empty(index.shape[0], dtype=torch.float64)


def _fake_gram(index: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    sq = g.new_empty(index.shape[0], dtype=torch.float64)
    return sq, torch.empty_like(sq)


def _scratch(_index: Tensor, g: Tensor, *_: object) -> int:
    return bytes_alive(reference.chunk_bytes(g), len(g))


def _fake_sum(_index: Tensor, g: Tensor, rows: int, _w: Tensor) -> Tensor:
    return g.new_empty((rows, g.shape[-1]), dtype=accumulation_dtype(g))


per_example_grads = register(
    "embedding_per_example_grads(Tensor index, Tensor g, int rows) -> Tensor", reference.per_example_grads, _fake_grads
)
sq_norms = register(
    "embedding_sq_norms(Tensor index, Tensor g, int rows) -> Tensor", reference.sq_norms, _fake_sq_norms, _scratch
)
gram_sq_norms = register(
    "embedding_gram_sq_norms(Tensor index, Tensor g) -> (Tensor, Tensor)", reference.gram_sq_norms, _fake_gram
)
clipped_sum = register(
    "embedding_clipped_sum(Tensor index, Tensor g, int rows, Tensor w) -> Tensor",
    reference.clipped_sum,
    _fake_sum,
    _scratch,
)
weighted_sum = register(
    "embedding_weighted_sum(Tensor index, Tensor g, int rows, Tensor w) -> Tensor", reference.weighted_sum, _fake_sum
)
