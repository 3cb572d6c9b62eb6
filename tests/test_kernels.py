"""The ops by themselves: fast paths against the reference formulas, float64, layouts, and the one-sided bound."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import LAYOUTS, relayout
from dpfast.kernels import affine, chunks, clip, conv, dispatch, embedding, linear, norm
from dpfast.kernels.conv import ConvSpec, library, reference

GEOMETRIES = {  # weight shape, space of the input, options
    "3x3": ((6, 4, 3, 3), (8, 7), {"padding": 1}),
    "3x3, two vectors and more": ((13, 40, 3, 3), (5, 6), {"padding": 1}),
    "3x3, one channel more than a vector": ((3, 9, 3, 3), (6, 6), {"padding": 1}),
    "1x1": ((6, 16, 1, 1), (8, 7), {}),
    "1x1, many positions": ((7, 17, 1, 1), (20, 21), {}),
    "one channel": ((5, 1, 3, 3), (8, 8), {"padding": 1}),
    "one output": ((1, 24, 3, 3), (8, 8), {"padding": 1}),
    "grouped": ((6, 2, 3, 3), (8, 7), {"groups": 2, "padding": 1}),
    "grouped, wide": ((14, 18, 3, 3), (4, 5), {"groups": 2, "padding": 1}),
    "depthwise": ((8, 1, 3, 3), (6, 6), {"groups": 8, "padding": 1}),
    "strided, dilated": ((6, 4, 3, 2), (8, 7), {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)}),
    "strided, dilated, wide": ((6, 12, 3, 2), (8, 9), {"stride": (2, 3), "dilation": (2, 1), "padding": (2, 1)}),
    "no padding, rows cut off": ((4, 10, 2, 2), (7, 9), {"stride": 2}),
    "same, even": ((6, 12, 4, 2), (8, 7), {"padding": "same"}),
    "one position": ((6, 12, 4, 4), (4, 4), {}),
    "one tap along lines": ((6, 9, 3, 1), (8, 7), {"padding": (1, 0), "dilation": (2, 1)}),
    "1-d, a long line": ((5, 11, 3), (700,), {"padding": 1}),
    "3-d": ((4, 9, 2, 3, 3), (3, 5, 4), {"padding": (0, 1, 1), "stride": (1, 2, 1)}),
    "transposed": ((4, 6, 3, 3), (8, 7), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
    "transposed, wide": ((10, 20, 4, 4), (4, 3), {"stride": 2, "padding": 1, "transposed": True}),
    "transposed, grouped": ((4, 3, 4, 4), (8, 7), {"stride": 2, "groups": 2, "transposed": True}),
}
VARIED = (
    *(
        "3x3",
        "3x3, two vectors and more",
        "1x1",
        "1x1, many positions",
        "strided, dilated, wide",
        "one tap along lines",
    ),
    *("no padding, rows cut off", "grouped, wide", "transposed, wide", "3-d"),
)
NATIVE = dispatch.why_not_native() is None
needs_native = pytest.mark.skipif(not NATIVE, reason=str(dispatch.why_not_native()))
BACKENDS = [pytest.param("native", marks=needs_native), "reference"]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN: a number that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def convolution(geometry: str, rows: int, dtype=torch.float64):
    """Input, output gradient and spec; the output's shape comes from torch itself."""
    shape, space, options = GEOMETRIES[geometry]
    transposed = bool(options.get("transposed"))
    torch.manual_seed(0)
    channels = shape[0] if transposed else shape[1] * options.get("groups", 1)
    weight, a = torch.randn(shape, dtype=dtype), torch.randn(rows, channels, *space, dtype=dtype)
    out = function_of(geometry)(a, weight)
    return a, torch.randn_like(out), ConvSpec.of(weight, **options), weight


def function_of(geometry: str):
    shape, _, options = GEOMETRIES[geometry]
    dims, kwargs = len(shape) - 2, {k: v for k, v in options.items() if k != "transposed"}
    name = f"conv_transpose{dims}d" if options.get("transposed") else f"conv{dims}d"
    return lambda a, weight: getattr(torch, name)(a, weight, **kwargs)


def by_autograd(geometry: str, a, g, weight, examples: int) -> torch.Tensor:
    """Per-example gradients from torch alone."""
    weight = weight.detach().to(a.dtype).requires_grad_()
    rows = a.shape[0] // examples
    parts = [slice(i * rows, (i + 1) * rows) for i in range(examples)]
    return torch.stack([torch.autograd.grad(function_of(geometry)(a[p], weight), weight, g[p])[0] for p in parts])


def relative(got, exact) -> float:
    """Error of a tensor relative to its norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_all_forms(geometry, a, g, weight, spec, examples, backend) -> None:
    """The 2x rule: an error at most twice that of torch in the same dtype, plus a few roundings."""
    exact = by_autograd(geometry, a.double().contiguous(), g.double().contiguous(), weight, examples)
    plain = by_autograd(geometry, a.float().contiguous(), g.float().contiguous(), weight, examples)
    squares, w = exact.flatten(1).square().sum(1), torch.rand(examples, dtype=torch.float64)
    theirs = relative(plain, exact)

    def check(got, wanted, power=1) -> None:
        """A square has twice the relative error of what is squared."""
        assert got.shape == wanted.shape
        assert relative(got, wanted) <= power * (2 * theirs + 4e-7)

    grads, sq = conv.per_example_grads(a, g, spec, examples, backend=backend)
    check(grads, exact)
    check(sq, squares, power=2)
    torch.testing.assert_close(sq, grads.double().flatten(1).square().sum(1), rtol=1e-6, atol=0)
    check(conv.sq_norms(a, g, spec, examples, backend=backend), squares, power=2)
    gram, bound = conv.gram_sq_norms(a, g, spec, examples, backend=backend)
    assert ((gram - squares).abs() <= bound).all()
    check(conv.clipped_sum(a, g, spec, w, backend=backend), torch.tensordot(w, exact, 1))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("examples", [1, 3, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_forms(geometry, backend, examples, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 100_000)  # several chunks
    a, g, spec, weight = convolution(geometry, rows=2 * examples, dtype=torch.float32)
    assert_all_forms(geometry, a, g, weight, spec, examples, backend)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_formulas(geometry, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 100_000)  # several chunks
    a, g, spec, weight = convolution(geometry, rows=10)
    exact = by_autograd(geometry, a, g, weight, 5)
    squares = exact.flatten(1).square().sum(1)
    w = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(reference.per_example_grads(a, g, spec, 5), exact)
    torch.testing.assert_close(conv.gram_sq_norms(a, g, spec, 5)[0], squares)
    torch.testing.assert_close(reference.clipped_sum(a, g, spec, w), torch.tensordot(w, exact, 1))
    torch.testing.assert_close(conv.clipped_sum(a, g, spec, w), torch.tensordot(w, exact, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", VARIED)
def test_convolution_layouts(geometry, layout, backend) -> None:
    a, g, spec, weight = convolution(geometry, rows=6, dtype=torch.float32)
    assert_all_forms(geometry, relayout(a, layout), relayout(g, layout), weight, spec, 3, backend)
    assert_all_forms(geometry, relayout(a, layout), g, weight, spec, 3, backend)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 3, 8])
@needs_native
def test_many_examples_and_rows_of_few_positions(rows) -> None:
    """Rows are taken several at a time, the last of them fewer; waves of examples and parts of the sum likewise."""
    for examples in (2, 37):
        a, g, spec, weight = convolution("3x3", rows=rows * examples, dtype=torch.float32)
        assert_all_forms("3x3", a, g, weight, spec, examples, "native")


def assert_all_channels(dtype: torch.dtype) -> None:
    """Every size of the native tiles, whose vectors reach into what lies beside them, on lines of eight and more."""
    spec_of = {k: ConvSpec.of(torch.empty(1, 1, k, k), padding=k // 2) for k in (1, 3)}
    for kernel, c, p in itertools.product(spec_of, (3, 8, 9, 16, 17, 33), (*range(1, 14), 24, 25)):
        a, g = torch.randn(2, c, 3, 11).to(dtype), torch.randn(2, p, 3, 11).to(dtype)
        spec = dataclasses.replace(spec_of[kernel], weight_shape=(p, c, kernel, kernel))
        exact, _ = conv.per_example_grads(a.double(), g.double(), spec, 2, backend="reference")
        grads, sq = conv.per_example_grads(a, g, spec, 2, backend="native")
        assert relative(grads, exact) < 1e-6, (kernel, c, p)
        assert relative(sq, exact.flatten(1).square().sum(1)) < 1e-6, (kernel, c, p)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_channels(dtype) -> None:
    assert_all_channels(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", VARIED)
def test_bfloat16_is_summed_in_float32(geometry, layout, backend) -> None:
    a, g, spec, weight = convolution(geometry, rows=6, dtype=torch.float32)
    a, g = relayout(a.bfloat16(), layout), relayout(g.bfloat16(), layout)
    assert conv.per_example_grads(a, g, spec, 3, backend=backend)[0].dtype == torch.float32
    assert_all_forms(geometry, a, g, weight, spec, 3, backend)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lines_of_every_length(channels_last, dtype) -> None:
    """Among numbers that are not read: what surrounds a line in memory, and what a stride leaves out, is not finite."""
    for kernel, stride, padding in itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2)):
        for length in range(kernel, 20):
            out = (length + 2 * padding - kernel) // stride + 1
            read = {t * stride + tap - padding for t in range(out) for tap in range(kernel)}
            shape = (4, length + 4, 5) if channels_last else (4, 5, length + 4)
            room = torch.full(shape, torch.inf, dtype=dtype)
            room = room.mT if channels_last else room
            a, g = room[..., 2:-2], torch.randn(4, 3, out).to(dtype)
            at = [i for i in range(length) if i in read]
            a[..., at] = torch.randn(4, 5, len(at)).to(dtype)
            g = g.mT.contiguous().mT if channels_last else g
            spec = ConvSpec.of(torch.empty(3, 5, kernel), stride=stride, padding=padding)
            grads, sq = conv.per_example_grads(a, g, spec, 2, backend="native")
            clean = a.nan_to_num(posinf=0).double()
            options = ([stride], [padding], [1], False, [0], 1, [False, True, False])
            exact = [
                torch.ops.aten.convolution_backward(y.double(), x, x.new_empty(3, 5, kernel), None, *options)[1]
                for x, y in zip(clean.chunk(2), g.chunk(2), strict=True)
            ]
            assert relative(grads, torch.stack(exact)) <= 1e-6
            assert torch.equal(sq, conv.sq_norms(a, g, spec, 2, backend="native"))


def test_float16_is_summed_in_float32() -> None:
    a, g, spec, weight = convolution("3x3", rows=4, dtype=torch.float32)
    assert_all_forms("3x3", a.half(), g.half(), weight, spec, 2, None)


@pytest.mark.usefixtures("_threads")
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_of_what_is_measured_bit_by_bit(dtype) -> None:
    """With one example and a weight of 1, the sum is the stored gradient."""
    for geometry in GEOMETRIES:
        a, g, spec, _ = convolution(geometry, rows=4, dtype=torch.float32)
        a, g = a.to(dtype), g.to(dtype)
        grads, _ = conv.per_example_grads(a, g, spec, 2, backend="native")
        for i in range(2):
            total = conv.clipped_sum(a, g, spec, torch.eye(2)[i], backend="native")
            assert torch.equal(total, grads[i]), geometry


SIZES = [(3, 5, 7, 6), (2, 1, 40, 30), (4, 300, 16, 13), (1, 64, 33, 1), (5, 3, 1, 9)]  # B, M, D, P


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_linear_forms(size, layout, dtype, backend) -> None:
    torch.manual_seed(0)
    b, m, d, p = size
    a, g, w = torch.randn(b, m, d), torch.randn(b, m, p), torch.rand(b, dtype=torch.float64)
    a, g = a.to(dtype), g.to(dtype)
    if layout == "expanded":  # along the sum: features that are all alike would be one number, and its error chance
        a = a[:, :1].expand_as(a)
    else:
        a, g = relayout(a, layout), relayout(g, layout)
    exact = torch.einsum("bmp,bmd->bpd", g.double(), a.double())
    plain = torch.einsum("bmp,bmd->bpd", g.float(), a.float())
    limit = 2 * relative(plain, exact) + 4e-7
    grads, sq = linear.per_example_grads(a, g, backend=backend)
    assert relative(grads, exact) <= limit
    assert relative(sq, exact.square().sum((1, 2))) <= 2 * limit  # squares have twice the relative error
    assert relative(linear.sq_norms(a, g, backend=backend), exact.square().sum((1, 2))) <= 2 * limit
    assert relative(linear.gram_sq_norms(a, g)[0], exact.square().sum((1, 2))) <= 1e-5
    for total in (linear.clipped_sum(a, g, w, backend=backend), linear.weighted_sum(a, g, w)):
        assert relative(total, torch.tensordot(w, exact, 1)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_of_one_input_share_its_gram(dtype, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 2_000)  # several chunks
    torch.manual_seed(0)
    a, *gs = (torch.randn(5, 7, n).to(dtype) for n in (9, 4, 1, 12))
    exact = sum(torch.einsum("bmp,bmd->bpd", g.double(), a.double()).square().sum((1, 2)) for g in gs)
    sq, bound = linear.gram_sq_norms(a, *gs)
    assert relative(sq, exact) <= 1e-5
    assert ((sq - exact).abs() <= bound).all()


NORMS = [(6, 8, 5, 7), (4, 33, 9), (6, 12), (2, 64, 4, 4, 3), (3, 6, 1, 1), (6, 16, 16, 16)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", NORMS)
def test_group_norms(shape, dtype, layout, offset, backend) -> None:
    torch.manual_seed(0)
    x, g, examples = torch.randn(shape) + offset, torch.randn(shape), 1 if shape[0] == 3 else 2
    x, g = relayout(x.to(dtype), layout), relayout(g.to(dtype), layout)
    channels = shape[1]
    for groups in {1, channels} | ({2} if channels % 2 == 0 else set()):
        if channels // groups * x[0, 0].numel() == 1:
            continue  # torch refuses a group of one number

        def by_autograd(dtype, groups=groups):
            weight = torch.ones(channels, dtype=dtype, requires_grad=True)
            bias = torch.zeros(channels, dtype=dtype, requires_grad=True)
            found = []
            for rows, cotangent in zip(x.to(dtype).chunk(examples), g.to(dtype).chunk(examples), strict=True):
                out = torch.nn.functional.group_norm(rows.contiguous(), groups, weight, bias)
                found.append(torch.autograd.grad(out, (weight, bias), cotangent))
            return [torch.stack(grads) for grads in zip(*found, strict=True)]

        got = norm.group_norm_grads(x, g, groups, 1e-5, examples, backend=backend)
        for ours, plain, exact in zip(got, by_autograd(torch.float32), by_autograd(torch.float64), strict=True):
            assert relative(ours, exact) <= 2 * relative(plain, exact) + 1e-6


def ops():
    """A call of every op, by name."""
    assert all((affine.affine_grads, norm.group_norm_grads))  # an op is registered when its folder is imported
    a, g, spec, _ = convolution("3x3", rows=6, dtype=torch.float32)
    few, few_g, narrow, _ = convolution("one channel", rows=6, dtype=torch.float32)
    x, y, w = torch.randn(3, 5, 7), torch.randn(3, 5, 6), torch.rand(3)
    index, looked_up = torch.randint(0, 9, (3, 5)), torch.randn(3, 5, 4)
    b, c = torch.randn(3, 2, 8, 5), torch.randn(3, 2, 8, 5)
    n = torch.ops.dpfast
    return {
        "conv_per_example_grads": (n.conv_per_example_grads, (a, g, *spec.arguments, 3, None)),
        "conv_per_example_grads, few channels": (n.conv_per_example_grads, (few, few_g, *narrow.arguments, 3, None)),
        "conv_sq_norms": (n.conv_sq_norms, (a, g, *spec.arguments, 3, None)),
        "conv_gram_sq_norms": (n.conv_gram_sq_norms, (a, g, *spec.arguments, 3, None)),
        "conv_clipped_sum": (n.conv_clipped_sum, (a, g, *spec.arguments, w, None)),
        "linear_per_example_grads": (n.linear_per_example_grads, (x, y, None)),
        "linear_sq_norms": (n.linear_sq_norms, (x, y, None)),
        "linear_gram_sq_norms": (n.linear_gram_sq_norms, (x, [y, y[..., :2]])),
        "linear_clipped_sum": (n.linear_clipped_sum, (x, y, w, None)),
        "linear_weighted_sum": (n.linear_weighted_sum, (x, y, w)),
        "embedding_per_example_grads": (n.embedding_per_example_grads, (index, looked_up, 9)),
        "embedding_sq_norms": (n.embedding_sq_norms, (index, looked_up, 9)),
        "embedding_gram_sq_norms": (n.embedding_gram_sq_norms, (index, looked_up)),
        "embedding_clipped_sum": (n.embedding_clipped_sum, (index, looked_up, 9, w)),
        "embedding_weighted_sum": (n.embedding_weighted_sum, (index, looked_up, 9, w)),
        "affine_grads": (n.affine_grads, (b, c, None)),
        "group_norm_grads": (n.group_norm_grads, (torch.randn(6, 8, 5, 5), torch.randn(6, 8, 5, 5), 4, 1e-5, 3, None)),
        "bias_grads": (n.bias_grads, (b, None)),
        "clip_sq_norms": (n.clip_sq_norms, (x.flatten(1), None)),
        "clip_clipped_sums": (n.clip_clipped_sums, ([x.flatten(1), torch.randn(len(x), 5)], w, None)),
    }


@pytest.mark.parametrize("name", ops())
def test_every_op_is_registered_as_it_behaves(name) -> None:
    op, arguments = ops()[name]
    torch.library.opcheck(op.default, arguments)


def test_no_op_is_left_out() -> None:
    registered = {name.removeprefix("dpfast::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("dpfast::")}  # fmt: skip
    assert registered == {name.split(",")[0] for name in ops()}


LEVELS = """
import sys, torch
sys.path.insert(0, {folder!r})
from dpfast.kernels import dispatch
from test_kernels import GEOMETRIES, assert_all_channels, assert_all_forms, convolution
print(dispatch.native_module().instruction_set)
for geometry in GEOMETRIES:
    a, g, spec, weight = convolution(geometry, rows=6, dtype=torch.float32)
    assert_all_forms(geometry, a, g, weight, spec, 3, "native")
    assert_all_forms(geometry, a.bfloat16(), g.bfloat16(), weight, spec, 3, "native")
assert_all_channels(torch.float32)
assert_all_channels(torch.bfloat16)
"""


@needs_native
@pytest.mark.parametrize("level", ["base", "v3", "v4", "v4bf16"])
def test_every_instruction_set(level) -> None:
    code = LEVELS.format(folder=str(Path(__file__).parent))
    env = {**os.environ, "DPFAST_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == min(level, dispatch.native_module().instruction_set)  # as far as the processor goes


def test_no_examples() -> None:
    a, g, spec, _ = convolution("3x3", rows=0)
    for x, y in ((a, g), (a.float(), g.float())):
        assert [t.shape for t in conv.per_example_grads(x, y, spec, 0)] == [(0, 6, 4, 3, 3), (0,)]
        assert conv.sq_norms(x, y, spec, 0).shape == (0,)
        assert conv.gram_sq_norms(x, y, spec, 0)[0].shape == (0,)
        assert conv.clipped_sum(x, y, spec, torch.zeros(0)).abs().sum() == 0
    assert linear.sq_norms(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5)).shape == (0,)
    assert linear.clipped_sum(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5), torch.zeros(0)).abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "d", "p"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_nothing_to_add_up(m, d, p, backend) -> None:
    """Sequences without tokens, layers without inputs or outputs: sums of nothing, not a crash."""
    a, g, w = torch.randn(2, m, d), torch.randn(2, m, p), torch.ones(2)
    grads, sq = linear.per_example_grads(a, g, backend=backend)
    assert grads.shape == (2, p, d)
    for zero in (grads, sq, linear.sq_norms(a, g, backend=backend), linear.clipped_sum(a, g, w, backend=backend)):
        assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_of_zero_silences_what_is_not_finite(dtype) -> None:
    a, g, spec, _ = convolution("3x3", rows=6, dtype=dtype)
    w = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    expected = conv.clipped_sum(a, g, spec, w)
    a, g = a.clone(), g.clone()
    a[2], g[3] = float("inf"), float("nan")
    torch.testing.assert_close(conv.clipped_sum(a, g, spec, w), expected)
    x, y = torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 4, 6, dtype=dtype)
    expected = linear.clipped_sum(x, y, w)
    x[1], y[1] = float("nan"), float("inf")
    torch.testing.assert_close(linear.clipped_sum(x, y, w), expected)
    torch.testing.assert_close(linear.weighted_sum(x, y, w), expected)
    grads = torch.randn(3, 2, 2, dtype=dtype)
    expected = clip.clipped_sum(grads, w)
    grads[1] = float("nan")
    torch.testing.assert_close(clip.clipped_sum(grads, w), expected)


def test_clip_factors() -> None:
    sq = torch.tensor([-1e-6, 0.0, 1e-40, 0.25, 1.0, 4.0, 1e30, float("inf"), float("nan")])
    factors = clip.clip_factors(sq, 1.0)
    torch.testing.assert_close(factors, torch.tensor([0, 1, 1, 1, 1, 0.5, 1e-15, 0, 0]))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_sums_of_several_tensors(backend) -> None:
    """Of sizes around a block, with rows that are slices; what has no weight is not looked at."""
    torch.manual_seed(0)
    w = torch.tensor([0.5, 0.0, 1.0])
    grads = [torch.randn(3, n + 3)[:, :n] for n in (1, 7, 4095, 4096, 4097, 10000, 1)]
    for g in grads:
        g[1] = float("nan")
    exact = [torch.tensordot(w.double(), g.double().nan_to_num(), 1) for g in grads]
    for ours, total in zip(clip.clipped_sums(grads, w, backend=backend), exact, strict=True):
        assert relative(ours, total) <= 1e-6
    assert clip.clipped_sums([], w, backend=backend) == []


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
    for value, of_g, d, p in ((0.9069749375383391, 1.0, 16384, 64), (0.3604321146365417, 1.2949631387291571, 4608, 64)):
        alike = torch.full((1, 4, d), value)  # features that are all alike round alike
        alike[:, ::2] *= 1.001
        yield f"alike {d}", alike, of_g * sign[:, :4].expand(1, 4, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_never_understated_beyond_the_bound(dtype) -> None:
    for name, a, g in adversaries():
        a, g = a.to(dtype), g.to(dtype)
        exact = torch.einsum("bmp,bmd->bpd", g.double(), a.double()).square().sum((1, 2))
        exact = (exact - torch.finfo(torch.float32).tiny).clamp(min=0)  # what float32 squares cannot hold
        sq, bound = linear.gram_sq_norms(a, g)
        assert (sq.double() + bound.double() >= exact).all(), name
        assert (sq.double() - bound.double() <= exact).all(), name
        sq, bound = linear.gram_sq_norms(a, g[..., :2], g[..., 2:])  # the same numbers, as of two maps
        assert ((sq.double() - exact).abs() <= bound.double()).all(), name
        direct = linear.sq_norms(a, g).double()
        scale = (a.double().norm(dim=-1) * g.double().norm(dim=-1)).sum(1).square()
        assert (direct >= exact * (1 - 1e-3) - 1e-12 * scale).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding(dtype, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 1_000)  # several chunks
    torch.manual_seed(0)
    index, g, w = torch.randint(0, 7, (4, 9)), torch.randn(4, 9, 5, dtype=dtype), torch.rand(4, dtype=dtype)
    table = torch.zeros(7, 5, dtype=dtype, requires_grad=True)
    looked_up = [torch.nn.functional.embedding(i, table) for i in index]
    exact = torch.stack(
        [torch.autograd.grad(y, table, cotangent)[0] for y, cotangent in zip(looked_up, g, strict=True)]
    )
    torch.testing.assert_close(embedding.per_example_grads(index, g, 7), exact)
    torch.testing.assert_close(embedding.gram_sq_norms(index, g)[0], exact.double().square().sum((1, 2)))
    torch.testing.assert_close(embedding.sq_norms(index, g, 7), exact.double().square().sum((1, 2)))
    torch.testing.assert_close(embedding.clipped_sum(index, g, 7, w), torch.tensordot(w, exact, 1))
    torch.testing.assert_close(embedding.weighted_sum(index, g, 7, w), torch.tensordot(w, exact, 1))
    g, w = g.clone(), w.clone()
    g[1], w[1] = float("nan"), 0.0
    torch.testing.assert_close(embedding.clipped_sum(index, g, 7, w), torch.tensordot(w, exact, 1))


def test_the_library_takes_low_precision_and_gives_float32() -> None:
    a, g, spec, _ = convolution("3x3", rows=2, dtype=torch.float32)
    assert library.weight_grad(a.bfloat16(), g.bfloat16(), spec).dtype == torch.float32
