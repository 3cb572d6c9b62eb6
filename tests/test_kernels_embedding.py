"""The embedding ops against autograd in float64: layouts, dtypes, rows that are looked up twice, examples that are not
finite.
"""

import itertools

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import chunks, dispatch, embedding
from kernel_cases import device, needs_native, needs_triton, poisoned, relative  # noqa: F401 (fixtures)

SIZES = {  # B, M, V, D
    "reference": [(4, 9, 7, 5), (3, 1, 9, 16), (2, 40, 3, 33), (3, 6, 50, 1)],
    "triton": [(2, 4, 2, 3), (3, 1, 4, 2), (1, 6, 1, 1)],
}
SUMS = [embedding.clipped_sum, embedding.weighted_sum]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KINDS = [*(("reference", dtype) for dtype in DTYPES), pytest.param("triton", torch.float32, marks=needs_triton)]
in_every_kind = pytest.mark.parametrize(("backend", "dtype"), KINDS)
LAYOUTS_OF_BOTH = list(itertools.product(["reference"], DTYPES, [*LAYOUTS, "alike positions"], LAYOUTS))
LAYOUTS_OF_BOTH += [
    pytest.param("triton", torch.float32, "channels_last", "sliced", marks=needs_triton),
    pytest.param("triton", torch.float32, "expanded", "channels_last", marks=needs_triton),
    pytest.param("triton", torch.float16, "alike positions", "expanded", marks=needs_triton),
    pytest.param("triton", torch.bfloat16, "sliced", "transposed", marks=needs_triton),
]


def by_autograd(index, g, rows: int) -> torch.Tensor:
    """Per-example gradients ``[B, V, D]`` from torch alone."""
    table = torch.zeros(rows, g.shape[-1], dtype=g.dtype, requires_grad=True)
    looked_up = [torch.nn.functional.embedding(i, table) for i in index]
    return torch.stack([torch.autograd.grad(y, table, c)[0] for y, c in zip(looked_up, g, strict=True)])


def assert_all_forms(index, g, rows: int, backend) -> None:
    """The 2x rule: an error at most twice that of torch in the dtype of sums, plus a few roundings."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    exact, plain = by_autograd(index, g.double(), rows), by_autograd(index, g.to(dtype), rows)
    squares, w = exact.square().sum((1, 2)), torch.rand(len(g), dtype=torch.float64)
    limit = 2 * relative(plain, exact) + 4 * torch.finfo(dtype).eps
    grads = embedding.per_example_grads(index, g, rows, backend=backend)
    assert grads.dtype == dtype
    assert relative(grads, exact) <= limit
    gram, bound = embedding.gram_sq_norms(index, g, backend=backend)
    for sq in (gram, embedding.sq_norms(index, g, rows, backend=backend)):
        assert sq.dtype == torch.float64
        assert relative(sq, squares) <= 2 * limit  # squares have twice the relative error
    assert ((gram - squares).abs() <= bound).all()
    for form in SUMS:
        total = form(index, g, rows, w, backend=backend)
        assert total.dtype == dtype
        assert relative(total, torch.tensordot(w, exact, 1)) <= limit


@pytest.mark.parametrize(("backend", "dtype", "layout", "layout_of_index"), LAYOUTS_OF_BOTH)
def test_forms(backend, dtype, layout, layout_of_index, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 1_000 if backend == "reference" else 80)  # several chunks
    torch.manual_seed(0)
    for b, m, rows, d in SIZES[backend]:
        g, index = torch.randn(b, m, d, dtype=torch.float64).to(dtype), torch.randint(0, rows, (b, m))
        g = g[:, :1].expand_as(g) if layout == "alike positions" else relayout(g, layout)
        assert_all_forms(relayout(index, layout_of_index), g, rows, backend)
        assert_all_forms(index[:1].expand_as(index), g, rows, backend)


@in_every_kind
def test_several_blocks_of_features(backend, dtype) -> None:
    torch.manual_seed(0)
    assert_all_forms(torch.tensor([[1, 0, 1]]), torch.randn(1, 3, 1030).to(dtype), 2, backend)


@in_every_kind
def test_many_examples_look_up_one_row(backend, dtype) -> None:
    """More than are added up at a time, and each of them more than once."""
    torch.manual_seed(0)
    assert_all_forms(torch.zeros(21, 2, dtype=torch.int64), torch.randn(21, 2, 3).to(dtype), 1, backend)


@in_every_kind
def test_what_is_measured_is_summed_bit_by_bit(backend, dtype) -> None:
    torch.manual_seed(0)
    index, g = torch.randint(0, 3, (2, 9)), torch.randn(2, 9, 5).to(dtype)
    grads = embedding.per_example_grads(index, g, 3, backend=backend)
    for own, w in zip(grads, torch.eye(2), strict=True):
        assert torch.equal(embedding.clipped_sum(index, g, 3, w, backend=backend), own)
    sq = embedding.sq_norms(index, g, 3, backend=backend)
    assert relative(sq, grads.double().square().sum((1, 2))) <= 4 * torch.finfo(grads.dtype).eps


@in_every_kind
@pytest.mark.parametrize("form", SUMS)
def test_a_weight_of_zero_silences_what_is_not_finite(form, backend, dtype) -> None:
    torch.manual_seed(0)
    index, g, w = torch.randint(0, 7, (3, 4)), torch.randn(3, 4, 5).to(dtype), torch.tensor([0.5, 0.0, 1.0])
    expected = form(index, g, 7, w, backend=backend)
    for value in (float("nan"), float("inf")):
        g[1] = value
        assert torch.equal(form(index, g, 7, w, backend=backend), expected)


@in_every_kind
@pytest.mark.parametrize(("b", "m"), [(0, 4), (3, 0)])
def test_nothing_is_looked_up(b, m, backend, dtype) -> None:
    index, g, w = torch.zeros(b, m, dtype=torch.int64), torch.randn(b, m, 5).to(dtype), torch.ones(b)
    gram = embedding.gram_sq_norms(index, g, backend=backend)
    for zero in (embedding.sq_norms(index, g, 7, backend=backend), *gram):
        assert zero.shape == (b,)
        assert not zero.any()
    grads = embedding.per_example_grads(index, g, 7, backend=backend)
    for zero in (grads.sum(0), *(form(index, g, 7, w, backend=backend) for form in SUMS)):
        assert zero.shape == (7, 5)
        assert not zero.any()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(dispatch.KernelError, match=r"expected index \[B, M\] and g \[B, M, D\]; got index \[3, 5\]"):
        embedding.sq_norms(torch.zeros(3, 5, dtype=torch.int64), torch.randn(3, 4, 2), 7)


def test_devices_that_differ() -> None:
    with pytest.raises(dispatch.KernelError, match=r"expected one device .* on cpu, g .* on meta"):
        embedding.sq_norms(torch.zeros(3, 4, dtype=torch.int64), torch.empty(3, 4, 2, device="meta"), 7)


@needs_native
def test_there_is_no_native_kernel() -> None:
    with pytest.raises(dispatch.KernelError, match="no native kernel"):
        embedding.sq_norms(torch.zeros(3, 4, dtype=torch.int64), torch.randn(3, 4, 2), 7, backend="native")
