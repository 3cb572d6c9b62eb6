"""Rules for tables looked up by whole numbers."""

from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import IsTracked, Terms, Use
from dpfast.clipping.terms import EmbeddingTerm


def embedding(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | Problem | None:
    if max_norm is not None:
        return Problem((), "max_norm rewrites the table in the forward pass", "renormalise after the optimizer's step")
    if scale_grad_by_freq:
        return Problem((), "scale_grad_by_freq counts over the whole batch", "use scale_grad_by_freq=False")
    table_rows = weight.shape[0]

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        index = rows.split(saved[0]).flatten(1)
        g = rows.split(g)
        g = g.reshape(index.shape[0], index.shape[1], -1)
        if padding_idx is not None:
            g = g.masked_fill((index == padding_idx % table_rows).unsqueeze(-1), 0)
        return [(weight, EmbeddingTerm(index, g, table_rows))]

    return Use((input,), terms, tuple(range(input.ndim)))


def getitem(is_tracked: IsTracked, input: Tensor, index: Any) -> Use | None:
    """``table[index]`` with a whole-number tensor is an embedding."""
    if not is_tracked(input) or input.ndim != 2 or not isinstance(index, Tensor) or index.dtype != torch.int64:
        return None
    table_rows = input.shape[0]

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        looked_up = rows.split(saved[0]).flatten(1) % table_rows
        return [(input, EmbeddingTerm(looked_up, rows.split(g).flatten(1, -2), table_rows))]

    return Use((index,), terms, tuple(range(index.ndim)))


def torch_embedding(
    is_tracked: IsTracked,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | Problem | None:
    padding = None if padding_idx < 0 else padding_idx
    return embedding(is_tracked, indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def embedding_bag(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    *_: Any,
    **__: Any,
) -> Problem | None:
    looked_up = embedding(is_tracked, input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    return looked_up if isinstance(looked_up, Problem) else None


def index_select(is_tracked: IsTracked, input: Tensor, dim: int, index: Tensor) -> Use | None:
    """Along the first dimension: ``table[index]``."""
    return getitem(is_tracked, input, index) if dim in (0, -input.ndim) else None
