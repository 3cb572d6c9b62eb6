"""Timesteps: the distributions, and how an example's rows share them."""

import pytest
import torch

from dpfast.data import RowKeys
from dpfast.diffusion.timesteps import MixtureOfUniforms, Uniform, draw_timesteps
from dpfast.errors import ConfigError


def test_uniform_timesteps_and_stratification():
    t = draw_timesteps(Uniform(), RowKeys(3, torch.tensor([4, 9]), 5, 10), 1000)
    assert torch.equal(t.view(2, 10) // 100, torch.arange(10).expand(2, 10))
    loose = draw_timesteps(Uniform(), RowKeys(3, torch.arange(500), 5, 2), 1000, stratified=False)
    assert loose.min() >= 0
    assert loose.max() <= 999
    assert loose.float().mean().sub(500).abs() < 40


def test_mixture_shares_and_bounds():
    mixture = MixtureOfUniforms([(0.6, 30, 600), (0.1, 0, 30), (0.3, 600, 1000)])
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = mixture.icdf(u, 1000)
    assert bool((t.diff() >= 0).all())
    assert int(t.min()) == 0
    assert int(t.max()) == 999
    shares = [float(((t >= low) & (t < high)).float().mean()) for low, high in [(0, 30), (30, 600), (600, 1000)]]
    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=2e-5)
    inside = t[(t >= 30) & (t < 600)]
    assert inside.bincount(minlength=600)[30:].float().std() < 2


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([(0.5, 0, 10)], "sum to 1"),
        ([], "sum to 1"),
        ([(1.0, 5, 5)], "low < high"),
        ([(0.5, 0, 10), (0.5, 9, 20)], "overlap"),
    ],
)
def test_bad_mixtures(components, message):
    with pytest.raises(ConfigError, match=message):
        MixtureOfUniforms(components)


def test_mixture_beyond_the_scheduler():
    with pytest.raises(ConfigError, match="ends at 2000"):
        MixtureOfUniforms([(1.0, 0, 2000)]).icdf(torch.rand(3), 1000)
