"""The affine op against float64: layouts, dtypes, odd sizes, poisoned memory; native and reference alike."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dpfast.errors import ConfigError, DPFastError
from dpfast.kernels import dispatch, linear
from dpfast.kernels.affine import affine_grads, bias_grads
from dpfast.kernels.fingerprint import fingerprints
from kernel_cases import BACKENDS, device, in_every_kind, kinds, needs_native  # noqa: F401 (device is a fixture)


def _randn(*shape: int) -> Tensor:
    numbers = torch.randn(*shape, dtype=torch.float64, generator=_GENERATOR, device="cpu")
    return numbers.float().to(torch.get_default_device())


_GENERATOR = torch.Generator().manual_seed(5)


def _sliced(b: int, m: int, c: int, s: int) -> Tensor:
    return _randn(b + 1, m + 2, c + 3, 2 * s)[1:, 1:-1, 2:-1, ::2]


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "contiguous": _randn,
    "channels_last": lambda b, m, c, s: _randn(b, m, s, c).transpose(2, 3),
    "transposed": lambda b, m, c, s: _randn(s, c, m, b).permute(3, 2, 1, 0),
    "sliced": _sliced,
    "sliced_channels": lambda b, m, c, s: _randn(b, m, s, c + 5).transpose(2, 3)[:, :, 3:-2],
    "unaligned": lambda b, m, c, s: _randn(b * m * c * s + 1)[1:].view(b, m, c, s),
    "expanded_rows": lambda b, m, c, s: _randn(b, 1, c, s).expand(b, m, c, s),
    "expanded_positions": lambda b, m, c, s: _randn(b, m, c, 1).expand(b, m, c, s),
    "one_number": lambda b, m, c, s: _randn(1, 1, 1, 1).expand(b, m, c, s),
}
SIZES = [
    (3, 4, 64, 64),
    (2, 3, 17, 70),
    (2, 2, 300, 19),
    (3, 2, 24, 1),
    (2, 5, 1, 33),
    (1, 1, 1, 1),
    (2, 1, 3, 7),
    (1, 2, 5, 1000),
    (0, 3, 8, 16),
    (2, 0, 8, 16),
    (2, 3, 0, 16),
    (2, 3, 8, 0),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN: an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def _exact(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    a, g = a.double(), g.double()
    return torch.einsum("bmcs,bmcs->bc", a, g), torch.einsum("bmcs->bc", g)


def _assert_2x(ours: tuple[Tensor, ...], a: Tensor, g: Tensor) -> None:
    """Error at most twice that of plain torch in the dtype of the sums, plus one rounding of the result."""
    dtype = ours[0].dtype
    x, y = a.to(dtype), g.to(dtype)
    plain = (x * y).sum((1, 3)), y.sum((1, 3))
    for mine, torchs, exact in zip(ours, plain, _exact(a, g), strict=True):
        assert mine.shape == exact.shape
        if exact.numel() == 0:
            continue
        error, allowed = (mine - exact).abs().max(), 2 * (torchs - exact).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("g_layout", LAYOUTS)
@kinds(native=(torch.float32,))
def test_agrees_with_float64_in_every_layout(
    backend: dispatch.Backend, g_layout: str, size: tuple, dtype: torch.dtype
) -> None:
    g = _as(dtype, LAYOUTS[g_layout](*size))
    for make in LAYOUTS.values():
        a = _as(dtype, make(*size))
        _assert_2x(affine_grads(a, g, backend=backend), a, g)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@in_every_kind
def test_biases_agree_with_float64_in_every_layout(
    backend: dispatch.Backend, layout: str, size: tuple, dtype: torch.dtype
) -> None:
    g = _as(dtype, LAYOUTS[layout](*size))
    bias = bias_grads(g, backend=backend)
    assert bias.dtype == torch.float32
    assert bias.shape == (size[0], size[2])
    if bias.numel():
        scale = g.double().abs().sum((1, 3))
        assert ((bias - _exact(g, g)[1]).abs() <= 8 * torch.finfo(torch.float32).eps * scale).all()


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """In another dtype, and still the same strides."""
    if t.dtype == dtype:
        return t
    whole = torch.as_strided(t, (t.untyped_storage().nbytes() // t.itemsize,), (1,), 0).to(dtype)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    a, g = _randn(3, 2, 20, 40).to(dtype), _randn(3, 2, 20, 40).to(dtype)
    ours = affine_grads(a, g)
    assert {t.dtype for t in (*ours, bias_grads(g))} == {torch.float64 if dtype == torch.float64 else torch.float32}
    _assert_2x(ours, a, g)
    _assert_2x((ours[0], bias_grads(g)), a, g)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@needs_native
def test_native_error_does_not_grow_with_positions(layout: str) -> None:
    a, g = LAYOUTS[layout](1, 2, 16, 200_000), LAYOUTS[layout](1, 2, 16, 200_000) + 1
    weight, bias = affine_grads(a, g, backend="native")
    exact_weight, exact_bias = _exact(a, g)
    eps = torch.finfo(torch.float32).eps
    scale = (a.double() * g.double()).abs().sum((1, 3))
    assert ((weight - exact_weight).abs() <= 8 * eps * scale).all()
    for sums in (bias, bias_grads(g, backend="native")):
        assert ((sums - exact_bias).abs() <= 8 * eps * g.double().abs().sum((1, 3))).all()


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_native_is_the_same_for_any_number_of_threads(layout: str) -> None:
    a, g = LAYOUTS[layout](5, 3, 70, 90), LAYOUTS[layout](5, 3, 70, 90)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((*affine_grads(a, g, backend="native"), bias_grads(g, backend="native")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_examples_nan_stays_its_own(backend: dispatch.Backend) -> None:
    a, g = _randn(3, 2, 20, 40), _randn(3, 2, 20, 40)
    clean = affine_grads(a, g, backend=backend)
    a[1, 0, 4, 5], g[1, 1, 7, 8] = torch.inf, torch.nan
    weight, bias = affine_grads(a, g, backend=backend)
    assert not weight[1, [4, 7]].isfinite().any()
    assert bias[1, 7].isnan()
    for mine, theirs in zip((weight, bias), clean, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
    alone = bias_grads(g, backend=backend)
    assert alone[1, 7].isnan()
    torch.testing.assert_close(alone[[0, 2]], clean[1][[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_autograd_through_group_norm(backend: dispatch.Backend) -> None:
    """GroupNorm on [B*K, C, H, W], channels_last: the gradients of each example's own loss, in float64."""
    examples, augmult, channels = 3, 2, 8
    x = _randn(examples * augmult, channels, 5, 4).double()
    norm = torch.nn.GroupNorm(2, channels).double()
    g = _randn(*x.shape).double()
    x_hat = torch.nn.functional.group_norm(x, 2).to(memory_format=torch.channels_last)
    view = (examples, augmult, channels, 20)
    weight, bias = affine_grads(
        x_hat.float().view(examples, augmult, channels, 5, 4).flatten(3),
        g.float().to(memory_format=torch.channels_last).view(examples, augmult, channels, 5, 4).flatten(3),
        backend=backend,
    )
    _assert_2x((weight, bias), x_hat.float().reshape(view), g.float().reshape(view))
    for i in range(examples):
        rows = slice(i * augmult, (i + 1) * augmult)
        grads = torch.autograd.grad((norm(x[rows]) * g[rows]).sum(), [norm.weight, norm.bias])
        torch.testing.assert_close(weight[i].double(), grads[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias[i].double(), grads[1], rtol=1e-5, atol=1e-5)


def test_ops_work_on_values() -> None:
    """They have no gradients of their own, and say so by what they return."""
    a, g = _randn(2, 2, 3, 4).requires_grad_(), _randn(2, 2, 3, 4)
    weight, bias = affine_grads(a, g)
    assert not weight.requires_grad
    assert not bias.requires_grad


def test_default_dtype_does_not_reach_the_result() -> None:
    a, g = _randn(2, 2, 16, 20), _randn(2, 2, 16, 20)
    expected = affine_grads(a, g)
    torch.set_default_dtype(torch.float64)
    try:
        result = affine_grads(a, g)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(result, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("a", "g", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), r"one shape \[B, M, C, S\]; got a \[2, 3\]"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 5), r"g \[2, 1, 3, 5\]"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4).double(), "one floating dtype"),
        (torch.zeros(2, 1, 3, 4).int(), torch.zeros(2, 1, 3, 4).int(), "one floating dtype"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4, device="meta"), "one device"),
    ],
)
def test_wrong_inputs_are_named(a: Tensor, g: Tensor, words: str) -> None:
    with pytest.raises(DPFastError, match=words):
        affine_grads(a, g)


def test_native_refuses_what_it_cannot_read() -> None:
    t = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    with pytest.raises(DPFastError, match=r"plain CPU tensors outside autograd, all float32; got torch.float64 on cpu"):
        affine_grads(t, t, backend="native")
    with pytest.raises(DPFastError, match=r"all float32 or bfloat16; got torch\.float64"):
        bias_grads(t, backend="native")
    with pytest.raises(DPFastError, match=r"got torch\.float32 on cpu, torch\.bfloat16 on cpu"):
        linear.sq_norms(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5).bfloat16(), backend="native")
    with pytest.raises(DPFastError, match="expected 'native', 'triton', 'reference' or None"):
        affine_grads(t, t, backend="cuda")  # type: ignore[arg-type]


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """The backend is looked for anew in the test, and after it."""
    found = (dispatch._allowed, dispatch._find_native, dispatch.why_not_triton)
    for each in found:
        each.cache_clear()
    yield
    for each in found:
        each.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFAST_BACKEND", "reference")
    assert dispatch.backend() == "reference"
    assert "DPFAST_BACKEND=reference" in str(dispatch.why_not_native())
    monkeypatch.setenv("DPFAST_BACKEND", "natve")
    assert dispatch.backend() == "reference"
    dispatch._allowed.cache_clear()
    with pytest.raises(ConfigError, match="expected native, triton, reference or auto"):
        dispatch.backend()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"capability": (7, 5)}, "compute capability is 7.5"),
        ({"hip": "6.0"}, "built for ROCm"),
        ({"compiler": None}, "needs a C compiler"),
        ({}, None),
    ],
)
def test_gpus_that_triton_is_not_for(found: dict, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "DPFAST_BACKEND", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found.get("capability", (8, 0)))
    monkeypatch.setattr(torch.version, "hip", found.get("hip"))
    monkeypatch.setattr(dispatch.shutil, "which", lambda _: found.get("compiler", "/usr/bin/cc"))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: "there")
    reason = dispatch.why_not_triton()
    assert (reason is None) if words is None else words in str(reason)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("module", "words"), [("dpfast.no_such_module", "not built"), ("dpfast.errors", "version None")]
)
def test_missing_or_old_native_module_is_explained(module: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.zeros(2, 1, 3, 4)
    monkeypatch.delenv("DPFAST_BACKEND", raising=False)
    find = dispatch.importlib.import_module
    replaced = {"dpfast._native": module}
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: find(replaced.get(name, name)))
    assert dispatch.backend() == "reference"
    assert words in str(dispatch.why_not_native())
    affine_grads(t, t)
    assert len(fingerprints([t, t[:0]])) == 2
    with pytest.raises(DPFastError, match=words):
        affine_grads(t, t, backend="native")
    dispatch._allowed.cache_clear()
    monkeypatch.setenv("DPFAST_BACKEND", "native")
    with pytest.raises(ConfigError, match=words):
        dispatch.backend()
