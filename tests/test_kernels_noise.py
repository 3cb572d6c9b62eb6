"""``noise``: the stream against the vectors of RFC 8439, and every backend against the formulas."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cases import LAYOUTS, relayout
from dpfast.kernels.dispatch import KernelError
from dpfast.kernels.noise import KEY_BYTES, noised, reference
from dpfast.kernels.noise.reference import chacha20
from kernel_cases import BACKENDS, device, needs_native, needs_triton, poisoned, threads  # noqa: F401 (fixtures)

KEY = bytes(range(32))
WORDS = tuple(np.frombuffer(KEY, dtype="<u4").tolist())
KERNELS = [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
FEW = (0, 1, 7, 8, 9, 100, 1023, 5000)


def serialised(words: np.ndarray) -> str:
    return words.T.astype("<u4").tobytes().hex()


def test_the_block_of_rfc_8439() -> None:
    """Section 2.3.2."""
    block = chacha20(WORDS, np.array([1], dtype=np.uint32), (0x09000000, 0x4A000000, 0))
    assert serialised(block) == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_the_keystream_of_rfc_8439() -> None:
    """Appendix A.1, vectors 1 and 2: the key and the nonce are 0."""
    blocks = chacha20((0,) * 8, np.array([0, 1], dtype=np.uint32))
    assert serialised(blocks) == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def by_the_formula(n: int) -> torch.Tensor:
    """z from the bytes of the stream, number by number."""
    blocks = -(-n // 8)
    z = np.empty(8 * blocks)
    for b in range(blocks):
        stream = chacha20(WORDS, np.array([b], dtype=np.uint32)).T.astype("<u4").tobytes()
        u = [1 - (int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 12) / 2**52 for i in range(8)]
        for j in range(4):
            radius, angle = math.sqrt(-2 * math.log(u[j])), 2 * math.pi * u[j + 4]
            z[j * blocks + b], z[(j + 4) * blocks + b] = radius * math.cos(angle), radius * math.sin(angle)
    return torch.from_numpy(z[:n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 8, 37, 300])
def test_numbers_are_those_of_the_formula(n, backend) -> None:
    z = noised(torch.zeros(n, dtype=torch.float64), 1.0, 1.0, KEY, backend=backend)
    torch.testing.assert_close(z.cpu(), by_the_formula(n), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [*FEW, pytest.param(70_001, marks=pytest.mark.large)])
def test_every_backend_adds_the_same_noise(n, dtype, backend) -> None:
    assert_same(n, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend) -> None:
    """Dense tensors keep their order in memory; what noise a number has is decided by that order alone."""
    x = relayout(torch.randn(3, 6, 5, 4), layout)
    ours = noised(x, 2.0, 4.0, KEY, backend=backend)
    assert ours.stride() == torch.empty_like(x).stride()
    flat = ours.as_strided((x.numel(),), (1,))
    z = (4 * flat.double() - torch.empty_like(ours).copy_(x).as_strided((x.numel(),), (1,))) / 2
    torch.testing.assert_close(z.cpu(), by_the_formula(x.numel()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, backend) -> None:
    x = torch.randn(100).to(dtype)
    exact = noised(x.double(), 1.5, 20.0, KEY, backend=backend)
    assert torch.equal(noised(x, 1.5, 20.0, KEY, backend=backend), exact.to(dtype))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
def test_numbers_are_normal_and_independent(backend) -> None:
    z = noised(torch.zeros(800_000, dtype=torch.float64), 1.0, 1.0, KEY, backend=backend).view(8, -1)
    assert stats.kstest(z.flatten(), "norm").pvalue > 0.01
    for values in (z, z.square()):
        correlation = torch.corrcoef(values) - torch.eye(8)
        assert correlation.abs().max() < 5 / math.sqrt(z.shape[1])
    followers = torch.corrcoef(torch.stack([z.flatten()[:-1], z.flatten()[1:]]))[0, 1]
    assert followers.abs() < 4 / math.sqrt(z.numel())


def test_another_key_is_other_noise() -> None:
    x = torch.zeros(1000, dtype=torch.float64)
    first = noised(x, 1.0, 1.0, KEY)
    for bit in range(256):
        other = bytearray(KEY)
        other[bit // 8] ^= 1 << bit % 8
        assert (noised(x, 1.0, 1.0, bytes(other)) == first).sum() < 2


@pytest.mark.parametrize(("word", "longest"), [(0, 0.0), (0xFFFFFFFF, math.sqrt(2 * 52 * math.log(2)))])
def test_the_ends_of_the_uniform(word, longest, monkeypatch) -> None:
    monkeypatch.setattr(reference, "chacha20", lambda *_: np.full((16, 2), word, dtype=np.uint32))
    z = noised(torch.zeros(16, dtype=torch.float64), 1.0, 1.0, KEY, backend="reference")
    assert z.abs().max() == pytest.approx(longest)


def assert_same(n, dtype, backend) -> None:
    """Up to rounding of the last place: a number may lie between two of float32."""
    x = torch.randn(n, dtype=dtype)
    ours, exact = (noised(x, 1.5, 20, KEY, backend=name) for name in (backend, "reference"))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, exact, rtol=2e-7 if dtype == torch.float32 else 0, atol=1e-15)


def test_what_cannot_be() -> None:
    for key in (b"", bytes(KEY_BYTES - 1)):
        with pytest.raises(KernelError, match="key of 32 bytes"):
            noised(torch.zeros(3), 1.0, 1.0, key)
    with pytest.raises(KernelError, match="floating-point"):
        noised(torch.zeros(3, dtype=torch.int64), 1.0, 1.0, KEY)
    with pytest.raises(KernelError, match="2\\^35"):
        noised(torch.zeros(1).expand(2**35 + 1), 1.0, 1.0, KEY)


GRID = 2.0**-20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_grid_numbers_and_noise_are_multiples_of_it(dtype, backend) -> None:
    """Each rounded by itself: to the nearest, so that neither moves by more than half of it."""
    x = 3 * torch.randn(1001, dtype=dtype)
    free, nothing = (noised(v.double(), 1.5, 1.0, KEY, backend=backend) for v in (x, torch.zeros_like(x)))
    on, noise = (noised(v.double(), 1.5, 1.0, KEY, grid=GRID, backend=backend) for v in (x, torch.zeros_like(x)))
    for numbers in (on, noise, on - noise):
        assert torch.equal(numbers / GRID, (numbers / GRID).round())
    assert (noise - nothing).abs().max() <= GRID / 2
    assert (on - noise - x.double()).abs().max() <= GRID / 2
    assert (on - free).abs().max() > GRID / 4
    divided = noised(x, 1.5, 7.0, KEY, grid=GRID, backend=backend)
    assert torch.equal(divided, (on / 7.0).to(dtype))


@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_has_the_same_grid(backend) -> None:
    """But for a number that lies half way between two, which rounds as its last bit says."""
    x = torch.randn(5000, dtype=torch.float64)
    ours, exact = (noised(x, 1.5, 1.0, KEY, grid=GRID, backend=name) for name in (backend, "reference"))
    assert (ours == exact).double().mean() > 0.999
    assert (ours - exact).abs().max() <= GRID


def test_a_grid_is_a_power_of_two() -> None:
    for grid in (0.3, -1.0, math.nan, math.inf):
        with pytest.raises(KernelError, match="a power of two, or 0"):
            noised(torch.zeros(3), 1.0, 1.0, KEY, grid=grid)
