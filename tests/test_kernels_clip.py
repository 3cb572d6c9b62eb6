"""Clip factors, squared norms and clipped sums of stored gradients against float64, in every layout."""

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.errors import DPFastError
from dpfast.kernels import clip
from kernel_cases import BACKENDS, device, needs_native, needs_triton, poisoned, relative, threads  # noqa: F401 (fixtures)

KINDS = [  # what gradients are stored in: parameters in half precision are refused
    pytest.param("native", torch.float32, marks=needs_native),
    ("reference", torch.float32),
    ("reference", torch.float64),
    pytest.param("triton", torch.float32, marks=needs_triton),
]
SHAPES = [(5,), (3, 1), (4, 7), (3, 1023), (3, 1025), (2, 4097), (3, 6, 5, 4), (2, 3, 4, 2, 3), (3, 2, 1500), (2, 0)]
in_every_kind = pytest.mark.parametrize(("backend", "dtype"), KINDS)


def tolerance(plain, exact, dtype) -> float:
    """The 2x rule: an error at most twice that of torch in the same dtype, plus a few roundings."""
    return 2 * relative(plain, exact) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_factors(dtype) -> None:
    sq = torch.tensor([-1e-6, 0.0, 1e-40, 0.25, 1.0, 4.0, 1e30, float("inf"), float("nan")], dtype=dtype)
    factors = clip.clip_factors(sq, 1.0)
    torch.testing.assert_close(factors, torch.tensor([0, 1, 1, 1, 1, 0.5, 1e-15, 0, 0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_automatic_clipping(dtype) -> None:
    """Short gradients are scaled up, one of length 0 by a finite factor."""
    sq = torch.tensor([-1e-6, 0.0, 1e-40, 0.25, 1.0, 4.0, 1e30, float("inf"), float("nan")], dtype=dtype)
    factors = clip.clip_factors(sq, 2.0, stability=0.5)
    torch.testing.assert_close(factors, torch.tensor([0, 4, 4, 2, 4 / 3, 0.8, 2e-15, 0, 0], dtype=dtype))


@pytest.mark.parametrize("stability", [0.0, -1.0, float("nan")])
def test_a_stability_that_bounds_nothing(stability) -> None:
    with pytest.raises(DPFastError, match=r"stability=.*expected a positive number.*got sq \[3\]"):
        clip.clip_factors(torch.ones(3), 1.0, stability=stability)


@pytest.mark.parametrize("stability", [1e-6, 0.01, 10.0])
@pytest.mark.parametrize("max_grad_norm", [1e-20, 1e-3, 1.0, 1e20])
def test_what_is_clipped_automatically_is_no_longer_than_the_clip_norm(max_grad_norm, stability) -> None:
    sq = torch.logspace(-60, 60, 1001, dtype=torch.float64)
    clipped = clip.clip_factors(sq, max_grad_norm, stability=stability) * sq.sqrt()
    limit = 1 + 4 * torch.finfo(torch.float64).eps
    assert (clipped <= max_grad_norm * limit).all()
    assert (clipped * limit >= max_grad_norm * (1 - stability / sq.sqrt())).all()


@pytest.mark.parametrize("max_grad_norm", [1e-20, 1e-3, 1.0, 1e20])
def test_what_is_clipped_is_no_longer_than_the_clip_norm(max_grad_norm) -> None:
    sq = torch.logspace(-60, 60, 1001, dtype=torch.float64)
    clipped = clip.clip_factors(sq, max_grad_norm) * sq.sqrt()
    limit = 1 + 4 * torch.finfo(torch.float64).eps
    assert (clipped <= max_grad_norm * limit).all()
    assert (clipped * limit >= sq.sqrt().clamp(max=max_grad_norm)).all()  # and no shorter than it has to be


@in_every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norms(shape, layout, backend, dtype) -> None:
    torch.manual_seed(0)
    grads = relayout(torch.randn(shape, dtype=dtype), layout)
    exact = grads.double().reshape(shape[0], -1).square().sum(1)
    plain = torch.linalg.vector_norm(grads.reshape(shape[0], -1), dim=1).square()
    sq = clip.sq_norms(grads, backend=backend)
    assert sq.dtype == torch.float64
    assert sq.shape == exact.shape
    assert relative(sq, exact) <= tolerance(plain, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squared_norms_of_many_numbers_that_round_alike(backend) -> None:
    """torch's own norm errs by 1e-3 here, and is too small for half of the numbers."""
    for number in (0.51, 0.63, 0.77, 0.98):
        grads = torch.full((1, 1 << 20), number)
        exact = grads[0, 0].double().square() * grads.numel()
        assert relative(clip.sq_norms(grads, backend=backend), exact) <= 1e-5


@in_every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_clipped_sum(shape, layout, backend, dtype) -> None:
    """In the dtype and shape of a gradient; an example without weight is not looked at."""
    torch.manual_seed(0)
    grads, w = torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=torch.float64)
    grads[1], w[1] = float("nan"), 0.0
    grads = relayout(grads, layout)
    exact = torch.tensordot(w, grads.double().nan_to_num(), 1)
    plain = torch.tensordot(w.to(dtype), grads.nan_to_num(), 1)
    total = clip.clipped_sum(grads, w, backend=backend)
    assert total.dtype == dtype
    assert total.shape == exact.shape
    assert relative(total, exact) <= tolerance(plain, exact, dtype)


@pytest.mark.usefixtures("threads")
@in_every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipped_sums_of_several_tensors(layout, backend, dtype) -> None:
    """Of sizes around a block, with rows that are slices; what has no weight is not looked at."""
    torch.manual_seed(0)
    w = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    grads = [relayout(torch.randn(3, n + 3, dtype=dtype), layout)[:, :n] for n in (1, 7, 4095, 4096, 4097, 10000, 1)]
    grads = [g.clone() if layout == "expanded" else g for g in grads]
    for g in grads:
        g[1] = float("nan")
    exact = [torch.tensordot(w, g.double().nan_to_num(), 1) for g in grads]
    plain = [torch.tensordot(w.to(dtype), g.nan_to_num(), 1) for g in grads]
    totals = clip.clipped_sums(grads, w, backend=backend)
    for ours, theirs, total in zip(totals, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, total) <= tolerance(theirs, total, dtype)
    assert clip.clipped_sums([], w, backend=backend) == []


@in_every_kind
def test_a_whole_gradient_is_summed_bit_by_bit(backend, dtype) -> None:
    """With a weight of 1 and others of 0, the sum is what was measured."""
    torch.manual_seed(0)
    grads = torch.randn(3, 40, 30, dtype=dtype)
    for i in range(3):
        assert torch.equal(clip.clipped_sum(grads, torch.eye(3)[i], backend=backend), grads[i])


def test_clipped_sum_of_permuted_gradients() -> None:
    grads = torch.randn(4, 2, 3, 5).permute(0, 2, 3, 1)
    w = torch.rand(4)
    torch.testing.assert_close(clip.clipped_sum(grads, w), torch.tensordot(w, grads, 1))
    torch.testing.assert_close(clip.clipped_sum(grads[:, 0, 0, 0], w), (w * grads[:, 0, 0, 0]).sum())
