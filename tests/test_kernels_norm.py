"""``norm``: the backward pass of a group norm, against torch and float64."""

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import norm
from dpfast.kernels.dispatch import KernelError
from kernel_cases import (
    BACKENDS,
    device,  # noqa: F401 (a fixture)
    in_every_kind,
    needs_native,
    needs_triton,
    poisoned,  # noqa: F401 (a fixture)
    relative,
    threads,  # noqa: F401 (a fixture)
)

NORMS = [(6, 8, 5, 7), (4, 33, 9), (6, 12), (2, 64, 4, 4, 3), (3, 6, 1, 1), (6, 16, 16, 16), (5, 34, 15, 16)]


@in_every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("shape", NORMS)
@pytest.mark.usefixtures("threads")
def test_group_norms(shape, dtype, layout, offset, backend) -> None:
    torch.manual_seed(0)
    x, g = relayout((torch.randn(shape) + offset).to(dtype), layout), relayout(torch.randn(shape).to(dtype), layout)
    assert_group_norms(x, g, 1 if shape[0] in (3, 5) else 2, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_g", LAYOUTS[::-1])
def test_layouts_that_differ(of_g, of_x, backend) -> None:
    x, g = relayout(torch.randn(4, 18, 5, 3), of_x), relayout(torch.randn(4, 18, 5, 3), of_g)
    assert_group_norms(x, g, 2, backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton), None])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(low, backend) -> None:
    """As autocast has it on a GPU: activations in low precision, gradients of norms in float32."""
    x, g, scales = torch.randn(4, 18, 5, 3).to(low), torch.randn(4, 18, 5, 3), torch.randn(18)
    dx, *affine = norm.group_norm_backward(x, g, scales, 2, 1e-5, 2, backend=backend)
    exact, *of_affine = norm.group_norm_backward(x.double(), g.double(), scales.double(), 2, 1e-5, 2)
    assert dx.dtype == low
    assert relative(dx, exact) <= torch.finfo(low).eps
    for ours, right in zip(affine, of_affine, strict=True):
        assert relative(ours, right) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (4, 8, 0)])
def test_nothing_to_normalise(shape, backend) -> None:
    x = torch.randn(shape)
    dx, weight, bias = norm.group_norm_backward(x, x, None, 4, 1e-5, shape[0], backend=backend)
    assert dx.shape == shape
    assert weight.shape == bias.shape == (shape[0], 8)
    assert not weight.any()
    assert not bias.any()


WRONG = {
    "one shape": {"g": torch.randn(4, 8, 3)},
    "groups that divide 8 channels": {"groups": 3},
    "examples that divide 4 rows": {"examples": 3},
    r"a weight \[C\] = \[8\]": {"weight": torch.ones(2)},
    "on one device": {"weight": torch.ones(8, device="meta")},
}


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message, backend) -> None:
    given = {"x": torch.randn(4, 8, 5), "g": torch.randn(4, 8, 5), "weight": torch.ones(8), "groups": 2, "examples": 2}
    with pytest.raises(KernelError, match=message):
        norm.group_norm_backward(**{**given, **WRONG[message]}, eps=1e-5, backend=backend)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes(dtype) -> None:
    x, g, weight = torch.randn(4, 8, 5), torch.randn(4, 8, 5), torch.randn(8).to(dtype)
    with pytest.raises(KernelError, match=r"all torch.float32|all float32"):
        norm.group_norm_backward(x, g, weight, 2, 1e-5, 2, backend="native")
    exact, *_ = norm.group_norm_backward(x.double(), g.double(), weight.double(), 2, 1e-5, 2)
    assert relative(norm.group_norm_backward(x, g, weight, 2, 1e-5, 2)[0], exact) <= 1e-5


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
        assert ours <= 2 * theirs + 1e-6 + (torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize == 2 else 0)
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
    """The norm of dx's first summand: a scale for errors where dx itself cancels."""
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
