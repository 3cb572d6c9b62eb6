"""The ops by themselves: fast paths against the reference formulas, float64, layouts."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import LAYOUTS, relayout
from dpfast.kernels import affine, chunks, clip, conv, dispatch, embedding, keyed, linear, noise, norm, registry
from dpfast.kernels.conv import ConvSpec, library, reference
from kernel_cases import (
    BACKENDS,
    GEOMETRIES,
    LARGE,
    by_autograd,
    convolution,
    device,  # noqa: F401 (a fixture)
    in_every_kind,
    needs_native,
    poisoned,  # noqa: F401 (a fixture)
    relative,
    threads,  # noqa: F401 (a fixture)
)

VARIED = (
    *(
        "3x3",
        "3x3, two vectors and more",
        "3x3, whole vectors",
        "1x1",
        "1x1, many positions",
        "strided, dilated, wide",
        "one tap along lines",
    ),
    *("no padding, rows cut off", "grouped, wide", "transposed, wide", "3-d"),
)


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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("examples", [2, 1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", [pytest.param(g, marks=LARGE) if "long line" in g else g for g in GEOMETRIES])
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


@in_every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", VARIED)
def test_convolution_layouts(geometry, layout, dtype, backend) -> None:
    """Half precision is summed in float32."""
    a, g, spec, weight = convolution(geometry, rows=6, dtype=torch.float32)
    a, g = a.to(dtype), g.to(dtype)
    assert conv.per_example_grads(a, g, spec, 3, backend=backend)[0].dtype == torch.float32
    for of_g in {layout, LAYOUTS[0]}:
        assert_all_forms(geometry, relayout(a, layout), relayout(g, of_g), weight, spec, 3, backend)


@pytest.mark.usefixtures("threads")
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


@pytest.mark.usefixtures("threads")
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


SIZES = [(3, 5, 7, 6), (2, 1, 40, 30), (4, 300, 16, 13), (1, 64, 33, 1), (5, 3, 1, 9), (2, 37, 24, 16)]  # B, M, D, P


@in_every_kind
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
    assert relative(linear.gram_sq_norms(a, g, backend=backend)[0], exact.square().sum((1, 2))) <= 1e-5
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


def ops():
    """A call of every op, by name."""
    assert all(
        (affine.affine_grads, embedding.sq_norms, keyed.normal, noise.noised, norm.group_norm_grads)
    )  # an op is registered when its folder is imported
    a, g, spec, _ = convolution("3x3", rows=6, dtype=torch.float32)
    few, few_g, narrow, _ = convolution("one channel", rows=6, dtype=torch.float32)
    x, y, w = torch.randn(3, 5, 7), torch.randn(3, 5, 6), torch.rand(3)
    index, looked_up = torch.randint(0, 9, (3, 5)), torch.randn(3, 5, 4)
    b, c = torch.randn(3, 2, 8, 5), torch.randn(3, 2, 8, 5)
    images = torch.randn(6, 8, 5, 5), torch.randn(6, 8, 5, 5)
    n = torch.ops.dpfast
    return {
        "conv_per_example_grads": (n.conv_per_example_grads, (a, g, *spec.arguments, 3, None)),
        "conv_per_example_grads, few channels": (n.conv_per_example_grads, (few, few_g, *narrow.arguments, 3, None)),
        "conv_sq_norms": (n.conv_sq_norms, (a, g, *spec.arguments, 3, None)),
        "conv_gram_sq_norms": (n.conv_gram_sq_norms, (a, g, *spec.arguments, 3, None)),
        "conv_clipped_sum": (n.conv_clipped_sum, (a, g, *spec.arguments, w, None)),
        "linear_per_example_grads": (n.linear_per_example_grads, (x, y, None)),
        "linear_sq_norms": (n.linear_sq_norms, (x, y, None)),
        "linear_gram_sq_norms": (n.linear_gram_sq_norms, (x, [y, y[..., :2]], None)),
        "linear_clipped_sum": (n.linear_clipped_sum, (x, y, w, None)),
        "linear_weighted_sum": (n.linear_weighted_sum, (x, y, w)),
        "embedding_per_example_grads": (n.embedding_per_example_grads, (index, looked_up, 9, None)),
        "embedding_sq_norms": (n.embedding_sq_norms, (index, looked_up, 9, None)),
        "embedding_gram_sq_norms": (n.embedding_gram_sq_norms, (index, looked_up, None)),
        "embedding_clipped_sum": (n.embedding_clipped_sum, (index, looked_up, 9, w, None)),
        "embedding_weighted_sum": (n.embedding_weighted_sum, (index, looked_up, 9, w, None)),
        "affine_grads": (n.affine_grads, (b, c, None)),
        "group_norm_grads": (n.group_norm_grads, (*images, 4, 1e-5, 3, None)),
        "group_norm_backward": (n.group_norm_backward, (*images, torch.randn(8), 4, 1e-5, 3, None)),
        "group_norm_backward, no weight": (n.group_norm_backward, (*images, None, 4, 1e-5, 3, None)),
        "bias_grads": (n.bias_grads, (b, None)),
        "clip_factors": (n.clip_factors, (w.double(), 0.5, None)),
        "clip_factors, automatic": (n.clip_factors, (w, 0.5, 0.01)),
        "clip_sq_norms": (n.clip_sq_norms, (x.flatten(1), None)),
        "keyed": (n.keyed, (torch.arange(3), 2, 0, 5, [1, 2], 7, True, None)),
        "noised": (n.noised, (x.mT, 1.5, 20.0, 0.25, list(range(8)), None)),
        "clip_clipped_sums": (n.clip_clipped_sums, ([x.flatten(1), torch.randn(len(x), 5)], w, None)),
    }


@pytest.mark.parametrize("name", ops())
def test_every_op_is_registered_as_it_behaves(name) -> None:
    op, arguments = ops()[name]
    torch.library.opcheck(op.default, arguments)


def test_no_op_is_left_out() -> None:
    """Of those in ``kernels``: the clipper has ops of its own, once it has compiled a step."""
    registered = {name.removeprefix("dpfast::") for name in registry._LIBRARY._op_defs}
    assert registered == {name.split(",")[0] for name in ops()}


def products():
    """What multiplies matrices, by name."""
    a, g, w, index = torch.randn(3, 5, 7), torch.randn(3, 5, 6), torch.rand(3), torch.zeros(3, 5, dtype=torch.int64)
    return {
        "clipped sum of stored gradients": lambda: clip.reference.clipped_sums([a.flatten(1)], w),
        "gradients": lambda: linear.reference.per_example_grads(a, g),
        "Gram": lambda: linear.reference.gram_sq_norms(a, g),
        "Gram of looked up rows": lambda: embedding.reference.gram_sq_norms(index, g),
        "weighted sum": lambda: linear.reference.weighted_sum(a, g, w),
    }


@pytest.mark.parametrize("name", products())
def test_products_are_in_full_precision(name) -> None:
    """Also where the process allows TF32 or bfloat16: a GPU would use it."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                found.append(torch.backends.cuda.matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("medium")
    try:
        with Watch():
            products()[name]()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(found) == {"ieee"}


LEVELS = """
import sys, torch
sys.path.insert(0, {folder!r})
from dpfast.kernels import dispatch
from test_kernels import GEOMETRIES, assert_all_channels, assert_all_forms, convolution
import test_kernels_keyed, test_kernels_noise
from test_kernels_norm import NORMS, assert_group_norms
print(dispatch.native_module().instruction_set)
for geometry in GEOMETRIES:
    a, g, spec, weight = convolution(geometry, rows=6, dtype=torch.float32)
    assert_all_forms(geometry, a, g, weight, spec, 3, "native")
    assert_all_forms(geometry, a.bfloat16(), g.bfloat16(), weight, spec, 3, "native")
assert_all_channels(torch.float32)
assert_all_channels(torch.bfloat16)
for shape in NORMS:
    x, g = torch.randn(shape), torch.randn(shape)
    assert_group_norms(x, g, 1, "native")
    assert_group_norms(x.bfloat16().transpose(1, -1), g.bfloat16().transpose(1, -1), 1, "native")
for dtype in (torch.float32, torch.float64):
    test_kernels_noise.assert_same(70_001, dtype, "native")
test_kernels_keyed.assert_same(5, 3, 1030, "native")
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


def test_the_library_takes_low_precision_and_gives_float32() -> None:
    a, g, spec, _ = convolution("3x3", rows=2, dtype=torch.float32)
    assert library.weight_grad(a.bfloat16(), g.bfloat16(), spec).dtype == torch.float32


A, G = torch.zeros(6, 4, 5, 5), torch.zeros(6, 3, 5, 5)
SPEC = ConvSpec.of(torch.empty(3, 4, 3, 3), padding=1)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
WRONG = {
    "conv: expected a [N, 4, *space] and g [N, 3, *out]": [
        lambda backend: conv.sq_norms(A, G, SPEC, 4, backend=backend),
        lambda backend: conv.per_example_grads(A, G[:3], SPEC, 3, backend=backend),
        lambda backend: conv.gram_sq_norms(G, A, SPEC, 3, backend=backend),
        lambda backend: conv.clipped_sum(A, G, SPEC, torch.ones(4), backend=backend),
    ],
    "linear: expected a [B, M, D], g [B, M, P] and, for sums, w [B]": [
        lambda backend: linear.sq_norms(torch.zeros(2, 3, 4), torch.zeros(2, 4, 5), backend=backend),
        lambda backend: linear.per_example_grads(torch.zeros(2, 3, 4), torch.zeros(3, 3, 5), backend=backend),
        lambda backend: linear.gram_sq_norms(torch.zeros(2, 3, 4), torch.zeros(2, 4, 5), backend=backend),
        lambda backend: linear.clipped_sum(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(3), backend=backend),
    ],
    "clip: expected": [
        lambda backend: clip.clipped_sum(torch.zeros(2, 3), torch.ones(3), backend=backend),
        lambda backend: clip.clipped_sums([torch.zeros(2, 3)], torch.ones(3), backend=backend),
    ],
    "bias_grads: expected g [B, M, C, S]; got g [2, 3, 4]": [
        lambda backend: affine.bias_grads(torch.zeros(2, 3, 4), backend=backend),
    ],
    "embedding: expected": [
        lambda _: embedding.sq_norms(INDEX - 1, torch.zeros(2, 3, 4), 5),
        lambda _: embedding.per_example_grads(INDEX + 5, torch.zeros(2, 3, 4), 5),
        lambda _: embedding.clipped_sum(INDEX, torch.zeros(2, 3, 4), 5, torch.ones(3)),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", WRONG)
def test_wrong_shapes_are_refused_before_memory_is_read(message, backend) -> None:
    for call in WRONG[message]:
        with pytest.raises(dispatch.KernelError) as error:
            call(backend)
        assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")  # the interpreter's, by numpy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", ["1-d, whole vectors", "no padding, rows cut off"])
def test_an_example_without_weight_leaves_no_trace(geometry, backend) -> None:
    """Whatever it holds; and the norms of others do not see it."""
    a, g, spec, _ = convolution(geometry, rows=6, dtype=torch.float32)
    clean = conv.per_example_grads(a, g, spec, 3, backend=backend)
    a[2], g[3] = float("nan"), float("inf")
    grads, sq = conv.per_example_grads(a, g, spec, 3, backend=backend)
    measured = conv.sq_norms(a, g, spec, 3, backend=backend)
    total = conv.clipped_sum(a, g, spec, torch.tensor([0.5, 0.0, 1.0]), backend=backend)
    torch.testing.assert_close(grads[::2], clean[0][::2])
    torch.testing.assert_close(total, 0.5 * clean[0][0] + clean[0][2])
    for found in (sq, measured):
        torch.testing.assert_close(found[::2], clean[1][::2], rtol=1e-6, atol=0)
        assert not found[1].isfinite()


@pytest.mark.skipif(dispatch.why_not_triton() is not None, reason=str(dispatch.why_not_triton()))
def test_a_whole_step_by_triton() -> None:
    """Every op that a clipper calls, in a process where the environment asks for Triton."""
    program = """
import torch
from torch import nn
from dpfast import GhostClipper, Performance
def clipped(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
    clipper = GhostClipper(model, max_grad_norm=0.1, augmult=2, performance=Performance(form=form))
    with clipper:
        clipper.backward(model(torch.randn(4, 4, 4, 4)).square().sum(1))
    return torch.cat([p.grad.flatten() for p in model.parameters()])
print(*(clipped(form).double().norm().item() for form in ("gram", "direct", "materialise")))
"""
    found = []
    for backend in ("triton", "reference"):
        env = {**os.environ, "DPFAST_BACKEND": backend}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found += map(float, done.stdout.split())
    assert found == pytest.approx([found[-1]] * 6, rel=1e-5)
