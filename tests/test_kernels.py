"""The ops by themselves: fast paths against the reference formulas, float64, layouts, and the one-sided bound."""

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import clip, conv, embedding, linear
from dpfast.kernels.conv import ConvSpec, library, reference

GEOMETRIES = {
    "3x3": ((6, 4, 3, 3), {"padding": 1}),
    "1x1": ((6, 4, 1, 1), {}),
    "grouped": ((6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "strided, dilated": ((6, 4, 3, 2), {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)}),
    "same, even": ((6, 4, 4, 2), {"padding": "same"}),
    "transposed": ((4, 6, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
    "transposed, grouped": ((4, 3, 4, 4), {"stride": 2, "groups": 2, "transposed": True}),
}


def convolution(geometry: str, rows: int, dtype=torch.float64):
    """Input, output gradient and spec; the output's shape comes from torch itself."""
    shape, options = GEOMETRIES[geometry]
    torch.manual_seed(0)
    weight, a = torch.randn(shape, dtype=dtype), torch.randn(rows, 4, 8, 7, dtype=dtype)
    function = torch.conv_transpose2d if options.get("transposed") else torch.conv2d
    out = function(a, weight, **{k: v for k, v in options.items() if k != "transposed"})
    return a, torch.randn_like(out), ConvSpec.of(weight, **options), weight


def by_autograd(geometry: str, a, g, weight, examples: int) -> torch.Tensor:
    """Per-example gradients from torch alone."""
    options = {k: v for k, v in GEOMETRIES[geometry][1].items() if k != "transposed"}
    function = torch.conv_transpose2d if GEOMETRIES[geometry][1].get("transposed") else torch.conv2d
    weight = weight.detach().requires_grad_()
    rows = a.shape[0] // examples
    parts = [slice(i * rows, (i + 1) * rows) for i in range(examples)]
    return torch.stack([torch.autograd.grad(function(a[p], weight, **options), weight, g[p])[0] for p in parts])


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.mark.parametrize("library_flops", [0.0, 1e12], ids=["library", "patches"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_forms(geometry, library_flops, monkeypatch) -> None:
    monkeypatch.setattr(conv, "LIBRARY_FLOPS", library_flops)
    monkeypatch.setattr(conv, "PATCH_BYTES", 100_000)  # several chunks
    a, g, spec, weight = convolution(geometry, rows=10)
    exact = by_autograd(geometry, a, g, weight, 5)
    squares = exact.flatten(1).square().sum(1)
    w = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(conv.per_example_grads(a, g, spec, 5), exact)
    torch.testing.assert_close(reference.per_example_grads(a, g, spec, 5), exact)
    torch.testing.assert_close(conv.direct_sq_norms(a, g, spec, 5), squares)
    torch.testing.assert_close(conv.gram_sq_norms(a, g, spec, 5)[0], squares)
    torch.testing.assert_close(conv.clipped_sum(a, g, spec, w), torch.tensordot(w, exact, 1))
    torch.testing.assert_close(reference.clipped_sum(a, g, spec, w), torch.tensordot(w, exact, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_layouts(geometry, layout) -> None:
    a, g, spec, weight = convolution(geometry, rows=6)
    a, g = relayout(a, layout), relayout(g, layout)
    exact = by_autograd(geometry, a.contiguous(), g.contiguous(), weight, 3)
    torch.testing.assert_close(conv.per_example_grads(a, g, spec, 3), exact)
    torch.testing.assert_close(conv.direct_sq_norms(a, g, spec, 3), exact.flatten(1).square().sum(1))
    torch.testing.assert_close(conv.gram_sq_norms(a, g, spec, 3)[0], exact.flatten(1).square().sum(1))
    torch.testing.assert_close(conv.clipped_sum(a, g, spec, torch.ones(3)), exact.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype) -> None:
    a, g, spec, weight = convolution("3x3", rows=4)
    a, g = a.to(dtype), g.to(dtype)
    exact = by_autograd("3x3", a.double(), g.double(), weight, 2)
    got = conv.per_example_grads(a, g, spec, 2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_examples() -> None:
    a, g, spec, _ = convolution("3x3", rows=0)
    assert conv.per_example_grads(a, g, spec, 0).shape == (0, 6, 4, 3, 3)
    assert conv.direct_sq_norms(a, g, spec, 0).shape == (0,)
    assert conv.gram_sq_norms(a, g, spec, 0)[0].shape == (0,)
    assert conv.clipped_sum(a, g, spec, torch.zeros(0)).abs().sum() == 0
    assert linear.direct_sq_norms(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5)).shape == (0,)


def test_a_weight_of_zero_silences_what_is_not_finite() -> None:
    a, g, spec, _ = convolution("3x3", rows=6)
    w = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    expected = conv.clipped_sum(a, g, spec, w)
    a, g = a.clone(), g.clone()
    a[2], g[3] = float("inf"), float("nan")
    torch.testing.assert_close(conv.clipped_sum(a, g, spec, w), expected)
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    expected = linear.clipped_sum(x, y, w)
    x[1], y[1] = float("nan"), float("inf")
    torch.testing.assert_close(linear.clipped_sum(x, y, w), expected)
    grads = torch.randn(3, 2, 2)
    expected = clip.clipped_sum(grads, w)
    grads[1] = float("nan")
    torch.testing.assert_close(clip.clipped_sum(grads, w), expected)


def test_clip_factors() -> None:
    sq = torch.tensor([-1e-6, 0.0, 1e-40, 0.25, 1.0, 4.0, 1e30, float("inf"), float("nan")])
    factors = clip.clip_factors(sq, 1.0)
    torch.testing.assert_close(factors, torch.tensor([1, 1, 1, 1, 1, 0.5, 1e-15, 0, 0]))


def test_clipped_sum_of_permuted_gradients() -> None:
    grads = torch.randn(4, 2, 3, 5).permute(0, 2, 3, 1)
    w = torch.rand(4)
    torch.testing.assert_close(clip.clipped_sum(grads, w), torch.tensordot(w, grads, 1))
    torch.testing.assert_close(clip.clipped_sum(grads[:, 0, 0, 0], w), (w * grads[:, 0, 0, 0]).sum())


def adversaries(m: int = 64, d: int = 48, p: int = 40):
    """Pairs (a, g) whose per-position terms nearly cancel, are wildly scaled, or vanish."""
    torch.manual_seed(0)
    a, g = torch.randn(1, 1, d), torch.randn(1, 1, p)
    sign = torch.tensor([1.0, -1.0]).repeat(m // 2).view(1, m, 1)
    noise_a, noise_g = torch.randn(1, m, d), torch.randn(1, m, p)
    huge = torch.ones(1, m, 1)
    huge[0, 3] = 1e6
    yield "random", noise_a, noise_g
    for size in (1e-2, 1e-4, 1e-6):
        yield f"cancelling {size}", a + size * noise_a, sign * (g + size * noise_g)
    yield "exactly cancelling", a.expand(1, m, d), (sign * g).expand(1, m, p)
    yield "one huge row", noise_a * huge, noise_g
    yield "denormal", noise_a * 1e-22, noise_g * 1e-22
    yield "offset", noise_a + 100, noise_g + 100 * sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_never_understated_beyond_the_bound(dtype) -> None:
    for name, a, g in adversaries():
        a, g = a.to(dtype), g.to(dtype)
        exact = torch.einsum("bmp,bmd->bpd", g.double(), a.double()).square().sum((1, 2))
        exact = (exact - torch.finfo(torch.float32).tiny).clamp(min=0)  # what float32 squares cannot hold
        sq, bound = linear.gram_sq_norms(a, g)
        assert (sq.double() + bound.double() >= exact).all(), name
        assert (sq.double() - bound.double() <= exact).all(), name
        direct = linear.direct_sq_norms(a, g).double()
        scale = (a.double().norm(dim=-1) * g.double().norm(dim=-1)).sum(1).square()
        assert (direct >= exact * (1 - 1e-3) - 1e-12 * scale).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding(dtype) -> None:
    torch.manual_seed(0)
    index, g, w = torch.randint(0, 7, (4, 9)), torch.randn(4, 9, 5, dtype=dtype), torch.rand(4, dtype=dtype)
    table = torch.zeros(7, 5, dtype=dtype, requires_grad=True)
    looked_up = [torch.nn.functional.embedding(i, table) for i in index]
    exact = torch.stack(
        [torch.autograd.grad(y, table, cotangent)[0] for y, cotangent in zip(looked_up, g, strict=True)]
    )
    torch.testing.assert_close(embedding.per_example_grads(index, g, 7), exact)
    torch.testing.assert_close(embedding.gram_sq_norms(index, g)[0], exact.square().sum((1, 2)))
    torch.testing.assert_close(embedding.clipped_sum(index, g, 7, w), torch.tensordot(w, exact, 1))


def test_the_library_takes_low_precision_and_gives_float32() -> None:
    a, g, spec, _ = convolution("3x3", rows=2, dtype=torch.float32)
    assert library.weight_grad(a.bfloat16(), g.bfloat16(), spec).dtype == torch.float32
