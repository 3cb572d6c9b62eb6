"""No squared norm is understated by more than its bound, whatever an example holds."""

from functools import partial

import pytest
import torch

from dpfast.kernels import clip, conv, embedding, linear
from dpfast.kernels.conv import ConvSpec
from dpfast.kernels.conv.reference import linear_view
from kernel_cases import (
    BACKENDS,
    GEOMETRIES,
    IN_TRITON,
    LARGE,
    by_autograd,
    convolution,
    device,  # noqa: F401 (a fixture)
    in_every_kind,
    poisoned,  # noqa: F401 (a fixture)
)

VANISHES = torch.finfo(torch.float32).tiny  # what float32 squares cannot hold
ROUNDING = torch.finfo(torch.float32).eps / 2
SQUARES = clip.reference.BLOCK * ROUNDING  # of a norm that comes from sums of squares
FEW = ("1-d, whole vectors", "no padding, rows cut off")
DTYPES = (torch.float32, torch.bfloat16)
# Numbers that round alike when they are added to each other: of a, and of g.
ALIKE = ((0.9069749375383391, 1.0), (0.3604321146365417, 1.2949631387291571), (0.7025, 0.7969), (0.3514, 0.3985))


def signs(n: int) -> torch.Tensor:
    return torch.tensor([1.0, -1.0]).repeat(n // 2)


def adversaries(a_shape, g_shape):
    """Terms ``a [terms, ...]`` and ``g [terms, ...]`` that nearly cancel, are wildly scaled, vanish or round alike."""
    torch.manual_seed(0)
    noise_a, noise_g = torch.randn(a_shape), torch.randn(g_shape)
    a, g = torch.randn(a_shape[1:]).expand(a_shape), torch.randn(g_shape[1:]).expand(g_shape)
    sign = signs(a_shape[0]).view(-1, *[1] * (len(a_shape) - 1))
    huge = torch.ones_like(sign)
    huge[-1] = 1e6
    pairs = {"random": (noise_a, noise_g)}
    for size in (1e-2, 1e-4, 1e-6):
        pairs[f"cancelling {size}"] = a + size * noise_a, sign * (g + size * noise_g)
    pairs["exactly cancelling"] = a, sign * g
    pairs["one huge row"] = noise_a * huge, noise_g
    pairs["huge where the other is small"] = noise_a * huge, noise_g / huge
    pairs["squares are denormal"] = noise_a * 1e-22, noise_g * 1e-22
    pairs["tiny and huge"] = noise_a * 1e-17, noise_g * 1e17
    for small, large in ((1e-22, 1e16), (2e-23, 1e16)):
        pairs[f"squares of a vanish {small}"] = noise_a * small, noise_g * large
        pairs[f"squares of g vanish {small}"] = noise_a * large, noise_g * small
        pairs[f"squares of g vanish, alike {small}"] = torch.full(a_shape, large), torch.full(g_shape, small)
    pairs["offset"] = noise_a + 100, noise_g + 100 * sign
    for value, of_g in ALIKE:
        pairs[f"alike {value}"] = torch.full(a_shape, value) * (1 + 5e-4 * (1 + sign)), of_g * sign.expand(g_shape)
    return pairs


def images(a_shape, g_shape):
    """The same of rows ``a [rows, C, *space]``, and those whose positions cancel within a row."""
    pairs = adversaries(a_shape, g_shape)
    positions = torch.Size(g_shape[2:]).numel()
    alternating = signs(positions + 1)[:positions].view(g_shape[2:])
    a, g = torch.randn(*a_shape[:2], *[1] * (len(a_shape) - 2)), torch.randn(*g_shape[:2], *[1] * (len(g_shape) - 2))
    pairs["cancelling positions"] = a.expand(a_shape), g * alternating
    pairs["positions alike"] = torch.full(a_shape, ALIKE[0][0]), alternating.expand(g_shape)
    a, g = (t.clone() for t in pairs["cancelling 0.0001"])
    a[:, :-1], g[:, :-1] = 0, 0
    pairs["the last channel alone"] = a, g
    return pairs


def stacked(pairs, dtype):
    """Names, and one example of each that the dtype can hold: ``a [B, terms, ...]`` and ``g [B, terms, ...]``."""
    cast = {name: tuple(t.to(dtype) for t in pair) for name, pair in pairs.items()}
    held = {name: pair for name, pair in cast.items() if all(t.isfinite().all() for t in pair)}
    return list(held), *map(torch.stack, zip(*held.values(), strict=True))


def assert_all(names, good) -> None:
    assert [name for name, is_good in zip(names, good, strict=True) if not is_good] == []


def assert_within(measured, exact, names) -> None:
    sq, bound = measured
    assert_all(names, (sq - exact).abs() <= bound + VANISHES)


def assert_direct(sq, exact, terms, magnitude, names) -> None:
    """A sum of n terms errs by n roundings of ``magnitude``, the sum of their norms; squares by those of a block."""
    error = 1.01 * (terms + 8) * ROUNDING * magnitude + SQUARES * exact.sqrt()
    assert_all(names, (sq.sqrt() - exact.sqrt()).abs() <= error + VANISHES**0.5)


def norms_of_sums(clipped_sum, *factors) -> torch.Tensor:
    """Squared, of each example's own: with a weight that rounds, beside another example with 0."""
    weights = torch.tensor([1.0, 0.0]) / 3
    pairs = [[i, i - 1] for i in range(len(factors[0]))]
    sums = [clipped_sum(*(t[pair] for t in factors), weights).double() for pair in pairs]
    return torch.stack([total.square().sum() for total in sums]) / weights[0].double().square()


def assert_of_the_sum(sq, own, names) -> None:
    """What is measured is what is added up."""
    assert_all(names, (sq - own).abs() <= 2 * SQUARES * own + VANISHES)


def assert_covered(measured, own, terms, names) -> None:
    """What is added up with other roundings than were measured is no longer than a Gram and its bound say, up to those
    of a sum that does not cancel.
    """
    sq, bound = measured
    assert_all(names, own <= (sq + bound) * (1 + 2.02 * (terms + 8) * ROUNDING) + VANISHES)


@in_every_kind
@pytest.mark.parametrize(
    ("terms", "d", "p"),
    [(64, 48, 40), (4, 600, 8), *(pytest.param(4, d, 64, marks=LARGE) for d in (16384, 4608))],
)
def test_linear(terms, d, p, backend, dtype) -> None:
    names, a, g = stacked(adversaries((terms, d), (terms, p)), dtype)
    exact = torch.einsum("bmp,bmd->bpd", g.double(), a.double()).square().sum((1, 2))
    gram = linear.gram_sq_norms(a, g, backend=backend)
    assert_within(gram, exact, names)
    assert_covered(gram, norms_of_sums(linear.weighted_sum, a, g), terms, names)
    assert_within(
        linear.gram_sq_norms(a, g[..., :2], g[..., 2:], backend=backend), exact, names
    )  # the same numbers, as of two maps
    magnitude = (a.double().norm(dim=-1) * g.double().norm(dim=-1)).sum(1)
    grads, stored = linear.per_example_grads(a, g, backend=backend)
    assert_of_the_sum(stored, norms_of_sums(clip.clipped_sum, grads), names)
    measured = linear.sq_norms(a, g, backend=backend)
    own = norms_of_sums(partial(linear.clipped_sum, backend=backend), a, g)
    assert_of_the_sum(measured, own, names)
    for sq in (stored, measured):
        assert_direct(sq, exact, terms, magnitude, names)
        assert (sq >= exact * (1 - 1e-3) - 1e-12 * magnitude.square() - VANISHES).all()


@in_every_kind
@pytest.mark.parametrize(
    "geometry", [*FEW, *(pytest.param(name, marks=LARGE) for name in GEOMETRIES if name not in FEW)]
)
def test_convolution(geometry, backend, dtype) -> None:
    like_a, like_g, spec, weight = convolution(geometry, rows=4)
    names, a, g = stacked(images(like_a.shape, like_g.shape), dtype)
    a, g, examples = a.flatten(0, 1), g.flatten(0, 1), len(names)
    exact = by_autograd(geometry, a.double(), g.double(), weight, examples).flatten(1).square().sum(1)
    gram = conv.gram_sq_norms(a, g, spec, examples, backend=backend)
    assert_within(gram, exact, names)
    patches, of_g = linear_view(a.double(), g.double(), spec, examples)
    terms, magnitude = patches.shape[2], (patches.norm(dim=-1) * of_g.norm(dim=-1)).sum((1, 2))
    grads, stored = conv.per_example_grads(a, g, spec, examples, backend=backend)
    assert_of_the_sum(stored, norms_of_sums(clip.clipped_sum, grads), names)
    measured = conv.sq_norms(a, g, spec, examples, backend=backend)

    def clipped_sum(a, g, w) -> torch.Tensor:
        return conv.clipped_sum(a.flatten(0, 1), g.flatten(0, 1), spec, w, backend=backend)

    own = norms_of_sums(clipped_sum, *(t.unflatten(0, (examples, -1)) for t in (a, g)))
    assert_of_the_sum(measured, own, names)
    for sq in (stored, measured):
        assert_direct(sq, exact, terms, magnitude, names)
    assert_covered(gram, own, terms, names)


@in_every_kind
@pytest.mark.parametrize(
    ("examples", "channels", "space", "kernel"),
    [
        pytest.param(200, 256, (2, 2), 1, marks=LARGE),  # many products in an inner product
        (50, 32, (2, 2), 3),
        *(pytest.param(8, 1, space, 1, marks=LARGE) for space in ((2048,), (40, 40))),  # many inner products in a chain
    ],
)
def test_convolution_of_numbers_that_round_alike(examples, channels, space, kernel, backend, dtype) -> None:
    """Nothing cancels here, but errors come nearest to their bounds."""
    torch.manual_seed(0)
    dims = len(space)
    a, g = (0.3 + torch.rand(2, examples, *[1] * (dims + 1))).to(dtype)
    a, g = a.expand(-1, channels, *space), g.expand(-1, channels, *space)
    spec = ConvSpec.of(torch.empty(channels, channels, *[kernel] * dims), padding=kernel // 2)
    exact = conv.per_example_grads(a.double(), g.double(), spec, examples, backend="reference")[1]
    assert_within(conv.gram_sq_norms(a, g, spec, examples, backend=backend), exact, range(examples))


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")  # the interpreter's, by numpy
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_that_nothing_looks_at(backend) -> None:
    """However large they are, where no gradient comes: a bound is a number."""
    a, g = torch.randn(2, 4, 5, 5), torch.zeros(2, 3, 2, 2)
    a[..., 2, :] = a[..., 2] = 1e20  # between the taps
    spec = ConvSpec.of(torch.empty(3, 4, 2, 2), stride=1, dilation=3)
    sq, bound = conv.gram_sq_norms(a, g, spec, 2, backend=backend)
    assert not bound[~sq.isnan()].isnan().any()


LOOKED_UP = {
    "one row": lambda position: 0 * position,
    "pairs": lambda position: position // 2,
    "pairs of few rows": lambda position: position // 2 % 5,
    "every row once": lambda position: position,
}


SIZES = ((64, 40), (4, 16384))
TABLES = [("reference", dtype, rows, *size) for dtype in DTYPES for rows in LOOKED_UP for size in SIZES]
TABLES += [pytest.param(*one.values, "pairs", 4, 6, marks=one.marks) for one in IN_TRITON]


@pytest.mark.parametrize(("backend", "dtype", "rows", "positions", "features"), TABLES)
def test_embedding(backend, rows, positions, features, dtype) -> None:
    """Rows that are looked up twice, with gradients that cancel."""
    pairs = adversaries((positions, features), (positions, features))
    names, _, g = stacked({**pairs, "one huge position": (pairs["random"][1], pairs["one huge row"][0])}, dtype)
    order = torch.randperm(positions)
    g, index = g[:, order], LOOKED_UP[rows](torch.arange(positions))[order].expand(len(names), -1)
    grads = torch.nn.functional.one_hot(index, positions).double().mT @ g.double()
    exact, magnitude = grads.square().sum((1, 2)), g.double().norm(dim=-1).sum(1)
    gram = embedding.gram_sq_norms(index, g, backend=backend)
    assert_within(gram, exact, names)
    own = norms_of_sums_of_rows(embedding.weighted_sum, index, g, positions, backend)
    assert_covered(gram, own, positions, names)
    stored = clip.sq_norms(embedding.per_example_grads(index, g, positions, backend=backend))
    measured = embedding.sq_norms(index, g, positions, backend=backend)
    own = norms_of_sums_of_rows(embedding.clipped_sum, index, g, positions, backend)
    for sq in (stored, measured):
        assert_direct(sq, exact, positions, magnitude, names)
        assert_of_the_sum(sq, own, names)


def norms_of_sums_of_rows(form, index, g, rows: int, backend) -> torch.Tensor:
    """As ``norms_of_sums``, in one call: every example looks up a table of its own."""
    examples = torch.arange(len(g))
    apart, weights = index + rows * examples.unsqueeze(1), torch.full((len(g),), 1.0) / 3
    own = form(apart, g, rows * len(g), weights, backend=backend).double().unflatten(0, (len(g), rows))
    return own.square().sum((1, 2)) / weights[0].double().square()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [256, 16384])
def test_embedding_of_numbers_that_round_alike(features, dtype) -> None:
    torch.manual_seed(0)
    g = (0.3 + torch.rand(200, 1, 1)).to(dtype).expand(-1, 2, features)
    index = torch.zeros(200, 2, dtype=torch.int64)
    exact = g.double().sum(1).square().sum(1)
    assert_within(embedding.gram_sq_norms(index, g), exact, range(200))
