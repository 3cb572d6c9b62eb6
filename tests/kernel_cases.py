"""What the tests of ops share: backends, poisoned memory, and convolutions with gradients from torch alone."""

import pytest
import torch

from dpfast.kernels import dispatch
from dpfast.kernels.conv import ConvSpec

GEOMETRIES = {  # weight shape, space of the input, options
    "3x3": ((6, 4, 3, 3), (8, 7), {"padding": 1}),
    "3x3, two vectors and more": ((13, 40, 3, 3), (5, 6), {"padding": 1}),
    "3x3, one channel more than a vector": ((3, 9, 3, 3), (6, 6), {"padding": 1}),
    "3x3, whole vectors": ((16, 8, 3, 3), (5, 7), {"padding": 1}),
    "dilated, whole vectors": ((8, 16, 3, 2), (6, 9), {"padding": (2, 0), "dilation": (2, 3)}),
    "1x1": ((6, 16, 1, 1), (8, 7), {}),
    "1x1, many positions": ((7, 17, 1, 1), (17, 16), {}),
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
    "1-d, a long line": ((5, 11, 3), (300,), {"padding": 1}),
    "1-d, whole vectors": ((16, 8, 3), (9,), {"padding": 1}),
    "3-d": ((4, 9, 2, 3, 3), (3, 5, 4), {"padding": (0, 1, 1), "stride": (1, 2, 1)}),
    "transposed": ((4, 6, 3, 3), (8, 7), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
    "transposed, wide": ((10, 20, 4, 4), (4, 3), {"stride": 2, "padding": 1, "transposed": True}),
    "transposed, one step": ((9, 6, 3, 3), (6, 7), {"padding": 1, "transposed": True}),
    "transposed, dilated": ((5, 12, 3, 2), (6, 7), {"dilation": 2, "output_padding": 1, "transposed": True}),
    "transposed, grouped": ((4, 3, 4, 4), (8, 7), {"stride": 2, "groups": 2, "transposed": True}),
}
NATIVE = dispatch.why_not_native() is None
needs_native = pytest.mark.skipif(not NATIVE, reason=str(dispatch.why_not_native()))
needs_triton = pytest.mark.skipif(dispatch.why_not_triton() is not None, reason=str(dispatch.why_not_triton()))
LARGE = pytest.mark.large  # for Triton's interpreter
BACKENDS = [pytest.param("native", marks=needs_native), "reference", pytest.param("triton", marks=needs_triton)]
IN_TRITON = [pytest.param("triton", dtype, marks=needs_triton) for dtype in dispatch.TRITON_DTYPES]


def kinds(native=dispatch.NATIVE_DTYPES) -> pytest.MarkDecorator:
    """Every backend in every dtype that it takes."""
    of_native = [pytest.param("native", dtype, marks=needs_native) for dtype in native]
    others = [("reference", dtype) for dtype in dispatch.TRITON_DTYPES]
    return pytest.mark.parametrize(("backend", "dtype"), [*of_native, *others, *IN_TRITON])


in_every_kind = kinds()


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def device(request):
    """Where tensors of a test are made: on the GPU for Triton, if there is one."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("backend") == "triton" and torch.cuda.is_available():
        with torch.device("cuda"):
            yield
    else:
        yield


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
