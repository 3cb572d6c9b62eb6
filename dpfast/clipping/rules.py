"""One rule per torch function: how a call uses its trainable parameters.

A rule has the signature of the function it stands for, with ``is_tracked`` in front. It returns the ``Use``, or None
when the call is not of the form it knows (``capture`` then falls back to per-example vector-Jacobian products).
Shapes in the comments use the alphabet of ``dpfast.kernels``: B examples, N rows, M rows per example, D inputs,
P outputs, C channels, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.clipping.norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    torch_batch_norm,
    torch_instance_norm,
)
from dpfast.clipping.problems import Problem
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import IsTracked, Rule, Terms, Use, present
from dpfast.clipping.terms import ConvTerm, EmbeddingTerm, LinearTerm, Stored
from dpfast.kernels.affine import bias_grads
from dpfast.kernels.conv import ConvSpec
from dpfast.kernels.precision import accumulation_dtype


def _matrix_rows(x: Tensor, rows: Rows) -> Tensor:
    """``[..., N, ..., D] -> [B, M, D]``."""
    x = rows.split(x)
    return x.flatten(1, -2)


def _row_dims(x: Tensor) -> tuple[int, ...]:
    """Dimensions that may hold rows when the last one holds features."""
    return tuple(range(x.ndim - 1))


# Linear maps


def linear(is_tracked: IsTracked, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    if is_tracked(input) or input.ndim < 2 or weight.ndim != 2:
        return None
    needs_input = is_tracked(weight)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        g = _matrix_rows(g, rows)
        return present(
            is_tracked,
            [
                (weight, lambda: LinearTerm(_matrix_rows(saved[0], rows), g)),
                (bias, lambda: Stored(bias_grads(g.unsqueeze(3)))),
            ],
        )

    return Use((input,) if needs_input else (), terms, _row_dims(input))


def matmul(is_tracked: IsTracked, input: Tensor, other: Tensor) -> Use | None:
    """``input @ other`` with a trainable ``[D, P]`` matrix on the right."""
    if is_tracked(input) or not is_tracked(other) or input.ndim < 2 or other.ndim != 2:
        return None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        return [(other, LinearTerm(_matrix_rows(g, rows), _matrix_rows(saved[0], rows)))]

    return Use((input,), terms, _row_dims(input))


# Convolutions


def conv(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use | None:
    spec = ConvSpec.of(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return _conv(is_tracked, input, weight, bias, spec)


def conv_transpose(
    is_tracked: IsTracked,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Use | None:
    spec = ConvSpec.of(
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=True,
        output_padding=output_padding,
    )
    return _conv(is_tracked, input, weight, bias, spec)


def _conv(is_tracked: IsTracked, input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Use | None:
    if is_tracked(input) or input.ndim != weight.ndim:  # an input without a row dimension
        return None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        return present(
            is_tracked,
            [
                (weight, lambda: ConvTerm(saved[0], g, spec, rows.examples)),
                (bias, lambda: Stored(bias_grads(rows.split(g).flatten(3)))),
            ],
        )

    return Use((input,) if is_tracked(weight) else (), terms, (0,))


# Embeddings


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


def fake_quant(is_tracked: IsTracked, input: Tensor, observer_on: Tensor, *_: Any, **__: Any) -> Problem | None:
    if not observer_on.any():
        return None
    return Problem((), "it observes the range of private activations", "switch the observers off (disable_observer)")


# Element by element, with broadcasting


def _reduce_to(rows: Rows, g: Tensor, target: Tensor) -> Tensor:
    """``[B, *target.shape]``: per example, the sum of the output's gradient ``g`` over what ``target`` spans."""
    shape = (1,) * (g.ndim - target.ndim) + tuple(target.shape)
    spans_rows = shape[rows.dim] != 1
    if spans_rows:  # each row has its own entry: only the rows of the example itself are not zero
        each = torch.arange(rows.examples, device=g.device).view(-1, *[1] * g.ndim)
        per_example = torch.where(rows.owner(g) == each, g, 0)
    else:
        per_example = rows.split(g).sum(1, dtype=accumulation_dtype(g)).unsqueeze(1 + rows.dim)
    over = [1 + d for d, size in enumerate(shape) if size == 1 and per_example.shape[1 + d] != 1]
    summed = per_example.sum(over, keepdim=True) if over else per_example
    return summed.reshape(rows.examples, *target.shape)


def _binary(is_tracked: IsTracked, left: Any, right: Any) -> tuple[Tensor, Any] | None:
    """``(the tracked operand, the other one)`` when exactly one is tracked."""
    if is_tracked(left) == is_tracked(right):
        return None
    return (left, right) if is_tracked(left) else (right, left)


def _additive(sign_left: float, sign_right: float) -> Rule:
    def rule(is_tracked: IsTracked, left: Any, right: Any, *, alpha: float = 1) -> Use | None:
        operands = _binary(is_tracked, left, right)
        if operands is None:
            return None
        target = operands[0]
        scale = sign_left if target is left else sign_right * alpha

        def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
            reduced = _reduce_to(rows, g, target)
            return [(target, Stored(reduced if scale == 1 else scale * reduced))]

        return Use((), terms)

    return rule


def multiply(is_tracked: IsTracked, left: Any, right: Any) -> Use | None:
    operands = _binary(is_tracked, left, right)
    if operands is None:
        return None
    target, other = operands

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        dtype = accumulation_dtype(g)
        return [(target, Stored(_reduce_to(rows, g.to(dtype) * saved[0].to(dtype), target)))]

    return Use((other,), terms)


def multiply_in_place(is_tracked: IsTracked, left: Any, right: Any) -> Use | None:
    """``left *= parameter``: the gradient needs ``left`` as it was."""
    return None if is_tracked(left) else multiply(is_tracked, left.detach().clone(), right)


add, subtract = _additive(1, 1), _additive(1, -1)


def subtract_reflected(is_tracked: IsTracked, left: Any, right: Any, *, alpha: float = 1) -> Use | None:
    """``right - alpha * left``."""
    rule: Use | None = subtract(is_tracked, right, left, alpha=alpha)  # type: ignore[assignment]
    return rule


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), conv_transpose),
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: torch_instance_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: torch_batch_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.fused_moving_avg_obs_fake_quant: fake_quant,
    torch.embedding: torch_embedding,
    Tensor.__getitem__: getitem,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), subtract),
    **dict.fromkeys((Tensor.__rsub__, torch.rsub), subtract_reflected),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), multiply),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), multiply_in_place),
}

MIXES_ROWS = frozenset({F.batch_norm, torch.batch_norm})
# Looked at even when no trainable parameter takes part: they mix rows, or write what they see.
GUARDED = frozenset(
    {
        *MIXES_ROWS,
        *(F.instance_norm, torch.instance_norm, F.embedding, F.embedding_bag, torch.fused_moving_avg_obs_fake_quant),
    }
)
