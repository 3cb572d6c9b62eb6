"""The embedding ops against autograd in float64: layouts, dtypes, rows that are looked up twice, examples that are not
finite.
"""

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import chunks, embedding
from kernel_cases import poisoned, relative  # noqa: F401 (poisoned is a fixture)

SIZES = [(4, 9, 7, 5), (3, 1, 9, 16), (2, 40, 3, 33), (3, 6, 50, 1)]  # B, M, V, D
SUMS = [embedding.clipped_sum, embedding.weighted_sum]


def by_autograd(index, g, rows: int) -> torch.Tensor:
    """Per-example gradients ``[B, V, D]`` from torch alone."""
    table = torch.zeros(rows, g.shape[-1], dtype=g.dtype, requires_grad=True)
    looked_up = [torch.nn.functional.embedding(i, table) for i in index]
    return torch.stack([torch.autograd.grad(y, table, c)[0] for y, c in zip(looked_up, g, strict=True)])


def assert_all_forms(index, g, rows: int) -> None:
    """The 2x rule: an error at most twice that of torch in the dtype of sums, plus a few roundings."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    exact, plain = by_autograd(index, g.double(), rows), by_autograd(index, g.to(dtype), rows)
    squares, w = exact.square().sum((1, 2)), torch.rand(len(g), dtype=torch.float64)
    limit = 2 * relative(plain, exact) + 4 * torch.finfo(dtype).eps
    grads = embedding.per_example_grads(index, g, rows)
    assert grads.dtype == dtype
    assert relative(grads, exact) <= limit
    gram, bound = embedding.gram_sq_norms(index, g)
    for sq in (gram, embedding.sq_norms(index, g, rows)):
        assert sq.dtype == torch.float64
        assert relative(sq, squares) <= 2 * limit  # squares have twice the relative error
    assert ((gram - squares).abs() <= bound).all()
    for form in SUMS:
        total = form(index, g, rows, w)
        assert total.dtype == dtype
        assert relative(total, torch.tensordot(w, exact, 1)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout_of_index", LAYOUTS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "alike positions"])
def test_forms(layout, layout_of_index, dtype, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 1_000)  # several chunks
    torch.manual_seed(0)
    for b, m, rows, d in SIZES:
        g, index = torch.randn(b, m, d, dtype=torch.float64).to(dtype), torch.randint(0, rows, (b, m))
        g = g[:, :1].expand_as(g) if layout == "alike positions" else relayout(g, layout)
        assert_all_forms(relayout(index, layout_of_index), g, rows)
        assert_all_forms(index[:1].expand_as(index), g, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", SUMS)
def test_a_weight_of_zero_silences_what_is_not_finite(form, dtype) -> None:
    torch.manual_seed(0)
    index, g, w = torch.randint(0, 7, (3, 9)), torch.randn(3, 9, 5).to(dtype), torch.tensor([0.5, 0.0, 1.0])
    expected = form(index, g, 7, w)
    for value in (float("nan"), float("inf")):
        g[1] = value
        assert torch.equal(form(index, g, 7, w), expected)


@pytest.mark.parametrize(("b", "m"), [(0, 4), (3, 0)])
def test_nothing_is_looked_up(b, m) -> None:
    index, g, w = torch.zeros(b, m, dtype=torch.int64), torch.randn(b, m, 5), torch.ones(b)
    for zero in (embedding.sq_norms(index, g, 7), *embedding.gram_sq_norms(index, g)):
        assert zero.shape == (b,)
        assert not zero.any()
    for zero in (embedding.per_example_grads(index, g, 7).sum(0), *(form(index, g, 7, w) for form in SUMS)):
        assert zero.shape == (7, 5)
        assert not zero.any()
