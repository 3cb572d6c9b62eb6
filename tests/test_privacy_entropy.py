"""The operating system's entropy, and the noise and samples made of it."""

import math
import os
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from dpfast.errors import ConfigError, PrivacyError
from dpfast.kernels import noise
from dpfast.privacy import entropy, poisson_sample, standard_normal, uniform
from dpfast.testing import injected_entropy


def test_uniform_is_53_bits_and_its_complement_is_never_zero(monkeypatch):
    monkeypatch.setattr(entropy, "source", lambda n: b"\xff" * n)
    assert uniform(3).tolist() == [1 - 2.0**-53] * 3
    monkeypatch.setattr(entropy, "source", lambda n: b"\x00" * n)
    assert uniform(3).tolist() == [0.0] * 3


def test_normal_has_the_normal_distribution():
    with injected_entropy(1):
        draws = standard_normal([500, 801]).numpy().ravel()
    assert stats.kstest(draws, "norm").pvalue > 0.01
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        error = math.sqrt(stats.norm.moment(2 * power) / draws.size)
        assert abs((draws**power).mean() - moment) < 4 * error


def test_the_two_halves_of_box_muller_are_independent():
    with injected_entropy(2):
        cosine, sine = standard_normal([2, 200_000]).numpy()
    assert abs(np.corrcoef(cosine, sine)[0, 1]) < 4 / math.sqrt(cosine.size)
    assert abs(np.corrcoef(cosine**2, sine**2)[0, 1]) < 4 / math.sqrt(cosine.size)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 7), (2, 3, 5)])
def test_shapes(shape):
    draws = standard_normal(shape)
    assert draws.shape == shape
    assert draws.dtype == torch.float64
    assert draws.unique().numel() == draws.numel()


def test_no_seed_reaches_the_noise():
    def draw():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        return standard_normal([8]), poisson_sample(1000, 0.5)

    (noise, sample), (other_noise, other_sample) = draw(), draw()
    assert not torch.equal(noise, other_noise)
    assert not torch.equal(sample, other_sample)


def test_every_key_and_every_sample_comes_from_the_operating_system(monkeypatch):
    """256 bits for each tensor of noise, 64 for each decision."""
    asked = []
    monkeypatch.setattr(entropy, "source", lambda n: asked.append(n) or os.urandom(n))
    for _ in range(2):
        standard_normal([10])
    poisson_sample(7, 0.5)
    assert asked == [32, 32, 8 * 7]


def test_the_key_is_the_bytes_of_the_operating_system(monkeypatch):
    key, x = bytes(range(100, 132)), torch.randn(50)
    monkeypatch.setattr(entropy, "source", lambda n: key[:n])
    assert torch.equal(entropy.noised(x, 1.5, 7.0), noise.noised(x, 1.5, 7.0, key))


def test_no_compiled_code_keeps_a_key(monkeypatch, caplog):
    """Not even where it would check that a key is the one that it was compiled with."""
    drawn = []
    monkeypatch.setattr(entropy, "source", lambda n: drawn.append(os.urandom(n)) or drawn[-1])
    step = torch.compile(lambda x: entropy.noised(x * 2, 1.0, 1.0) + 1, backend="eager")
    logged = caplog.at_level("DEBUG", logger="torch._dynamo")
    with torch._dynamo.config.patch(recompile_limit=1), logged, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = [step(torch.zeros(8)) for _ in range(4)]
    assert len(drawn) == 4
    assert torch.stack(results).unique().numel() == 32
    assert not any(repr(key) in caplog.text + str([str(one.message) for one in said]) for key in drawn)


@pytest.mark.parametrize("again", ["vmap", "trace"])
def test_noise_that_would_be_used_twice_is_refused(again):
    def draw(x):
        return entropy.noised(x, 1.0, 1.0)

    with pytest.raises(PrivacyError, match="more than once"):
        torch.vmap(draw)(torch.zeros(3, 4)) if again == "vmap" else make_fx(draw)(torch.zeros(4))


def test_injected_entropy_repeats_and_always_ends():
    with injected_entropy(3):
        first = standard_normal([4])
        assert entropy.is_injected()
    with injected_entropy(3):
        assert torch.equal(standard_normal([4]), first)
        assert not torch.equal(standard_normal([4]), first)
    with pytest.raises(ZeroDivisionError), injected_entropy(3):
        1 / 0  # noqa: B018
    assert not entropy.is_injected()
    assert entropy.source is os.urandom


def test_poisson_sample_is_a_binomial_number_of_distinct_indices():
    n, q, rounds = 400, 0.25, 500
    with injected_entropy(4):
        samples = [poisson_sample(n, q) for _ in range(rounds)]
    assert samples[0].dtype == torch.int64
    assert all((s.diff() > 0).all() and s.min() >= 0 and s.max() < n for s in samples)
    sizes = np.array([len(s) for s in samples])
    assert abs(sizes.mean() - n * q) < 4 * math.sqrt(n * q * (1 - q) / rounds)
    # The size varies as a binomial does: a fixed batch size would have variance 0.
    assert 0.8 < sizes.var() / (n * q * (1 - q)) < 1.2
    counts = np.bincount(torch.cat(samples).numpy(), minlength=n)
    assert stats.chisquare(counts).pvalue > 0.01


def test_poisson_sample_at_its_ends():
    assert torch.equal(poisson_sample(9, 1.0), torch.arange(9))
    with injected_entropy(5):
        assert len(poisson_sample(3, 1e-6)) == 0


@pytest.mark.parametrize(("size", "rate"), [(0, 0.5), (10, 0.0), (10, 1.1), (10, -0.1), (10, math.nan)])
def test_poisson_sample_refuses(size, rate):
    with pytest.raises(ConfigError, match=r"plan\.sample_rate"):
        poisson_sample(size, rate)
