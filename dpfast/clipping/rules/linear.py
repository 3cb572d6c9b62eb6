"""Rules for linear maps and every other product of one trainable and one private tensor."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.clipping.rows import Rows
from dpfast.clipping.rules.elementwise import reduce_to
from dpfast.clipping.tape import IsTracked, Terms, Use, present
from dpfast.clipping.terms import ConvTerm, FactoredTerm, LinearTerm, Stored, Viewed
from dpfast.kernels.affine import bias_grads
from dpfast.kernels.conv import ConvSpec
from dpfast.kernels.precision import accumulation_dtype

Labels = tuple[Hashable, ...]  # of the dimensions of a tensor, as in torch.einsum


def _matrix_rows(x: Tensor, rows: Rows) -> Tensor:
    """``[..., N, ..., D] -> [B, M, D]``."""
    x = rows.split(x)
    return x.flatten(1, -2)


def _row_dims(x: Tensor) -> tuple[int, ...]:
    """Dimensions that may hold rows when the last one holds features."""
    return tuple(range(x.ndim - 1))


def linear(is_tracked: IsTracked, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    if is_tracked(input) or input.ndim < 2 or weight.ndim != 2:
        return None
    needs_input = is_tracked(weight)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        g = _matrix_rows(g, rows)
        return present(
            is_tracked,
            [
                # In the dtype of g, as in ``convolution``.
                (weight, lambda: LinearTerm(_matrix_rows(saved[0].to(g.dtype), rows), g)),
                (bias, lambda: Stored(bias_grads(g.unsqueeze(3)))),
            ],
        )

    return Use((input,) if needs_input else (), terms, _row_dims(input))


def bilinear(
    is_tracked: IsTracked, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Use | None:
    """``y[p] = x1 W[p] x2 + b[p]``: a linear map of the outer product of its inputs."""
    if is_tracked(input1) or is_tracked(input2) or input1.ndim < 2:
        return None
    needs_inputs, shape = is_tracked(weight), tuple(weight.shape)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        g = _matrix_rows(g, rows)

        def of_weight() -> FactoredTerm:
            dtype = accumulation_dtype(g)
            left, right = (_matrix_rows(x, rows).to(dtype) for x in saved)
            outer = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
            return Viewed(LinearTerm(outer, g), shape, (0, 1, 2), shape)

        return present(is_tracked, [(weight, of_weight), (bias, lambda: Stored(bias_grads(g.unsqueeze(3))))])

    return Use((input1, input2) if needs_inputs else (), terms, _row_dims(input1))


# Products of two tensors


def product(
    is_tracked: IsTracked, left: Tensor, right: Tensor, of_left: Labels, of_right: Labels, of_result: Labels
) -> Use | None:
    """``torch.einsum`` of a trainable and a private tensor, by the labels of their dimensions."""
    if is_tracked(left) == is_tracked(right):
        return None
    if is_tracked(left):
        left, right, of_left, of_right = right, left, of_right, of_left
    return _product(left, right, of_left, of_right, of_result)


def _product(data: Tensor, weight: Tensor, of_data: Labels, of_weight: Labels, of_result: Labels) -> Use | None:
    """Labels of all three are groups (heads); of data and result, rows; of data and weight, inputs; else, outputs."""
    sizes = dict(zip(of_data, data.shape, strict=True))
    of_one_alone = (set(of_data) ^ set(of_weight)) - set(of_result)
    if (
        any(len(set(labels)) != len(labels) for labels in (of_data, of_weight, of_result))  # a diagonal
        or any(sizes.setdefault(label, n) != n for label, n in zip(of_weight, weight.shape, strict=True))
        or any(sizes[label] != 1 for label in of_one_alone)  # summed before the product
    ):
        return None
    groups = [label for label in of_weight if label in of_data and label in of_result]
    inputs = [label for label in of_weight if label in of_data and label not in of_result]
    outputs = [label for label in of_weight if label not in of_data and label in of_result]
    kept = [label for label in of_data if label in of_result and label not in of_weight]
    if not kept:
        return None
    row_dims = tuple(d for d, label in enumerate(of_result) if label in kept)
    turned = bool(inputs) and of_weight[0] in inputs and not groups  # a matrix [D, P]: the term has it so
    stored = [*groups, *inputs, *outputs] if turned else [*groups, *outputs, *inputs]
    shape = tuple(sizes[label] for label in stored)
    order = tuple(stored.index(label) for label in of_weight if label in stored)
    final = tuple(weight.shape)

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        first = of_result[rows.dim] if rows.dim in row_dims else kept[0]
        over_rows = [first, *(label for label in kept if label != first)]

        def factor(x: Tensor, labels: Labels, features: list[Hashable]) -> Tensor:
            """``[B, M, groups, features]``."""
            wanted = [*over_rows, *groups, *features]
            ones = [label for label in labels if label not in wanted]
            x = x.permute([labels.index(label) for label in (*ones, *wanted)])
            count = _size(sizes, groups), _size(sizes, features)
            return x.reshape(rows.examples, _size(sizes, over_rows) // rows.examples, *count)

        a, b = factor(saved[0].to(g.dtype), of_data, inputs), factor(g, of_result, outputs)
        return [(weight, Viewed(_by_group(b, a) if turned else _by_group(a, b), shape, order, final))]

    return Use((data,), terms, row_dims)


def _size(sizes: dict[Hashable, int], labels: Sequence[Hashable]) -> int:
    return int(torch.Size([sizes[label] for label in labels]).numel())


def _by_group(a: Tensor, g: Tensor) -> FactoredTerm:
    """Of ``a [B, M, H, D]`` and ``g [B, M, H, P]``, one matrix ``[P, D]`` for each of H groups: a grouped 1x1
    convolution with M positions.
    """
    if a.shape[2] == 1:
        return LinearTerm(a[:, :, 0], g[:, :, 0])
    examples, _, groups, outputs = g.shape
    weight = torch.empty(groups * outputs, a.shape[3], 1, device="meta")
    return ConvTerm(a.flatten(2).mT, g.flatten(2).mT, ConvSpec.of(weight, groups=groups), examples)


def einsum(is_tracked: IsTracked, equation: Any, *operands: Any) -> Use | None:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(tensors) != 2 or "->" not in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    one, two = tensors
    left, right = (_einsum_labels(name, t.ndim) for name, t in zip(inputs.split(","), (one, two), strict=True))
    in_ellipsis = max((label for label in (*left, *right) if isinstance(label, int)), default=-1) + 1
    of_result = _einsum_labels(result, len(result.replace("...", "")) + in_ellipsis)
    return product(is_tracked, one, two, left, right, of_result)


def _einsum_labels(name: str, dims: int) -> Labels:
    """Letters, and for the dimensions of an ellipsis whole numbers, counted from the last."""
    if "..." not in name:
        return tuple(name)
    before, after = name.split("...")
    count = dims - len(before) - len(after)
    return (*before, *reversed(range(count)), *after)


def tensordot(is_tracked: IsTracked, a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Use | None:
    if out is not None or isinstance(dims, Tensor):
        return None
    of_a, of_b = (
        (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else [_listed(side) for side in dims]
    )
    left: list[Hashable] = [("a", d) for d in range(a.ndim)]
    right: list[Hashable] = [("b", d) for d in range(b.ndim)]
    for of_left, of_right in zip(of_a, of_b, strict=True):
        right[of_right] = left[of_left]
    shared = set(left) & set(right)
    result = [label for label in (*left, *right) if label not in shared]
    return product(is_tracked, a, b, tuple(left), tuple(right), tuple(result))


def _listed(dims: Any) -> Sequence[int]:
    return [dims] if isinstance(dims, int) else dims


def matmul(is_tracked: IsTracked, input: Tensor, other: Tensor) -> Use | None:
    """``input @ other``, also of a matrix for each of several heads, and of vectors."""
    matrices = input.ndim > 1, other.ndim > 1
    left: list[Hashable] = [*_batch(input), *(["i"] if matrices[0] else []), "k"]
    right: list[Hashable] = [*_batch(other), "k", *(["j"] if matrices[1] else [])]
    wider = max((_batch(input), _batch(other)), key=len)
    batch: list[Hashable] = list(wider)
    for at in range(1, 1 + min(len(_batch(input)), len(_batch(other)))):
        one, two = input.shape[-2 - at], other.shape[-2 - at]
        if one == 1 != two:  # broadcast: a label of its own, of size 1
            left[left.index(at)] = ("one", at)
        elif two == 1 != one:
            right[right.index(at)] = ("one", at)
    result = [*batch, *(["i"] if matrices[0] else []), *(["j"] if matrices[1] else [])]
    return product(is_tracked, input, other, tuple(left), tuple(right), tuple(result))


def _batch(x: Tensor) -> list[Hashable]:
    """Labels of the dimensions before a matrix, counted from the last."""
    return list(reversed(range(1, x.ndim - 1)))


def matmul_reflected(is_tracked: IsTracked, input: Tensor, other: Tensor) -> Use | None:
    """``other @ input``."""
    return matmul(is_tracked, other, input)


def add_product(
    is_tracked: IsTracked, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Use | None:
    """``beta * input + alpha * left @ right``: ``torch.addmm`` and ``torch.baddbmm``."""
    of_factors = is_tracked(left) or is_tracked(right)
    use = matmul(is_tracked, left, right) if of_factors else Use((), lambda *_: [])
    if use is None:
        return None
    of_product, target = use.terms, is_tracked.base(input) if is_tracked(input) else None

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        wide = g.to(accumulation_dtype(g))
        found = list(of_product(saved, g if alpha == 1 else alpha * wide, rows))
        if target is not None:
            found.append((target, Stored(reduce_to(rows, g if beta == 1 else beta * wide, target.shape))))
        return found

    return Use(use.saved, terms, use.row_dims)
