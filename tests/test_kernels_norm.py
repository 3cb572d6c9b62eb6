"""``norm``: the backward pass of a group norm, against torch and float64."""

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import norm
from kernel_cases import (
    BACKENDS,
    needs_native,
    poisoned,  # noqa: F401 (a fixture)
    relative,
    threads,  # noqa: F401 (a fixture)
)

NORMS = [(6, 8, 5, 7), (4, 33, 9), (6, 12), (2, 64, 4, 4, 3), (3, 6, 1, 1), (6, 16, 16, 16), (5, 34, 15, 16)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", NORMS)
@pytest.mark.usefixtures("threads")
def test_group_norms(shape, dtype, layout, offset, backend) -> None:
    torch.manual_seed(0)
    x, g = relayout((torch.randn(shape) + offset).to(dtype), layout), relayout(torch.randn(shape).to(dtype), layout)
    assert_group_norms(x, g, 1 if shape[0] in (3, 5) else 2, backend)


def assert_group_norms(x, g, examples, backend) -> None:
    """The 2x rule, as for convolutions: see ``test_kernels``."""
    channels = x.shape[1]
    for groups in {1, channels} | ({2} if channels % 2 == 0 else set()):
        if channels // groups * x[0, 0].numel() == 1:
            continue  # torch refuses a group of one number
        scales = None if groups == 2 else torch.randn(channels)
        exact = by_autograd(x.double(), g.double(), scales, groups, examples)
        plain = by_autograd(x.float(), g.float(), scales, groups, examples)
        dx, *affine_grads = norm.group_norm_backward(x, g, scales, groups, 1e-5, examples, backend=backend)
        assert dx.dtype == x.dtype
        size = exact[0].norm() + summands(x.double(), g.double(), scales, groups)  # they may cancel wholly
        ours, theirs = ((found.double() - exact[0]).norm() / size for found in (dx, plain[0]))
        assert ours <= 2 * theirs + 1e-6 + (torch.finfo(x.dtype).eps / 2 if x.dtype == torch.bfloat16 else 0)
        alone = norm.group_norm_grads(x, g, groups, 1e-5, examples, backend=backend)
        for ours, by_itself, theirs, right in zip(affine_grads, alone, plain[1:], exact[1:], strict=True):
            assert relative(ours, right) <= 2 * relative(theirs, right) + 1e-6
            torch.testing.assert_close(ours, by_itself, rtol=1e-6, atol=1e-6 * right.abs().max().item())


def by_autograd(x, g, scales, groups, examples) -> list[torch.Tensor]:
    """Gradients of x, and of weight and bias by example."""
    x, found = x.contiguous().requires_grad_(), []
    weight = torch.ones(x.shape[1]).to(x) if scales is None else scales.to(x)
    weight, bias = weight.requires_grad_(), torch.zeros_like(weight).requires_grad_()
    for rows, cotangent in zip(x.chunk(examples), g.contiguous().chunk(examples), strict=True):
        out = torch.nn.functional.group_norm(rows, groups, weight, bias)
        found.append(torch.autograd.grad(out, (x, weight, bias), cotangent))
    dx, *others = zip(*found, strict=True)
    return [sum(dx), *map(torch.stack, others)]


def summands(x, g, scales, groups) -> torch.Tensor:
    """How long what is added up to dx is."""
    h = g if scales is None else g * scales.double().view(-1, *[1] * (x.ndim - 2))
    h, x = (t.reshape(len(t), groups, -1) for t in (h, x))
    return (h / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).norm()


@needs_native
def test_group_norm_rounds_to_bfloat16_as_torch_does() -> None:
    """A halfway case goes to the even neighbour, what is not a number stays so; in vectors and beside them."""
    for positions in (64, 7):
        x, g = torch.randn(2, 8, positions).bfloat16(), torch.randn(2, 8, positions).bfloat16()
        g[0] = float("nan")
        g[1] *= 1e-3
        dx, *_ = norm.group_norm_backward(x, g, None, 4, 1e-5, 2, backend="native")
        wide, *_ = norm.group_norm_backward(x.float(), g.float(), None, 4, 1e-5, 2, backend="native")
        torch.testing.assert_close(dx, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
        assert dx[0].isnan().all()
