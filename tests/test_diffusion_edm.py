"""EDM: identities of the preconditioning, the loss, and Heun's method where the denoiser is known."""

import itertools
import math

import pytest
import torch
from torch import nn

from dpfast import DPOptimizer, GhostClipper, Plan
from dpfast.data import Augment, RowKeys, font_digits
from dpfast.data.images import to_signed
from dpfast.data.shards import load_shards
from dpfast.diffusion import EDMObjective, UNetSpec, build_unet, generate_edm
from dpfast.diffusion.edm import HeunSampler, Preconditioning, edm_scheduler, generate_edm_shards
from dpfast.errors import ConfigError, DataError
from oracle import Clipped, assert_as_good_as_torch, per_example

SIGMAS = torch.logspace(-3, 2, 40, dtype=torch.float64)
SHAPE = (1, 4, 4)


class Recorder(nn.Module):
    """A network F that gives ``output`` and remembers what it was asked."""

    def __init__(self, output=None):
        super().__init__()
        self.output, self.weight = output or torch.zeros_like, nn.Parameter(torch.zeros(1))
        self.asked: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x, t, labels):
        self.asked.append((x, t, labels))
        return self.output(x)


def keys(augmult=4, ids=(4, 2, 9)) -> RowKeys:
    return RowKeys(7, torch.tensor(ids), 1, augmult)


@pytest.fixture(scope="module")
def fonts():
    return font_digits(16, seed=0)


# Preconditioning


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_is_the_papers(sigma_data) -> None:
    """Table 1, written out; without noise D leaves its input alone, under noise alone it forgets it."""
    torch.manual_seed(0)
    c, variance = Preconditioning(sigma_data), SIGMAS**2 + sigma_data**2
    torch.testing.assert_close(c.c_skip(SIGMAS), sigma_data**2 / variance)
    torch.testing.assert_close(c.c_out(SIGMAS), SIGMAS * sigma_data / variance**0.5)
    torch.testing.assert_close(c.c_in(SIGMAS), 1 / variance**0.5)
    torch.testing.assert_close(c.c_noise(SIGMAS), torch.log(SIGMAS) / 4)
    torch.testing.assert_close(c.weight(SIGMAS), variance / (SIGMAS * sigma_data) ** 2)
    torch.testing.assert_close(c.weight(SIGMAS) * c.c_out(SIGMAS) ** 2, torch.ones_like(SIGMAS))
    x, f = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    nothing, everything = torch.tensor(1e-9, dtype=torch.float64), torch.tensor(1e9, dtype=torch.float64)
    torch.testing.assert_close(c.denoised(f, x, nothing), x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(c.denoised(f, x, everything), sigma_data * f, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_target_gives_back_the_image(sigma_data) -> None:
    """D(y + sigma eps) = y exactly when F is the target."""
    torch.manual_seed(0)
    c, y, eps = Preconditioning(sigma_data), *torch.randn(2, 40, dtype=torch.float64)
    target = c.target(y, eps, SIGMAS)
    torch.testing.assert_close(c.denoised(target, y + SIGMAS * eps, SIGMAS), y)


def test_inputs_and_targets_have_unit_variance() -> None:
    torch.manual_seed(0)
    c, n = Preconditioning(0.5), 100_000
    y, eps = 0.5 * torch.randn(n, 1, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    sigma = SIGMAS[::8]
    for values in (c.target(y, eps, sigma), c.c_in(sigma) * (y + sigma * eps)):
        # Four standard errors of a variance: sqrt(2 / n) each.
        torch.testing.assert_close(values.var(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=4 * (2 / n) ** 0.5)


# The objective


def test_loss_is_the_weighted_squared_error_of_the_denoiser(fonts) -> None:
    model, objective, chosen = Recorder(torch.sin), EDMObjective(num_classes=10, augment=Augment(shift=1)), keys()
    losses = objective(model, fonts.images[:3], fonts.labels[:3], chosen)
    assert losses.shape == (12,)
    x, t, labels = model.asked[0]
    sigma = objective.sigmas(chosen)
    torch.testing.assert_close(t.double(), sigma.log() / 4, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, fonts.labels[:3].repeat_interleave(4))
    clean = Augment(shift=1)(to_signed(fonts.images[:3]), chosen).double()
    sigma, c = sigma[:, None, None, None], objective.preconditioning
    noisy = clean + sigma * chosen.normal(*clean.shape[1:], stream="noise").double()
    torch.testing.assert_close(x.double(), c.c_in(sigma) * noisy, rtol=1e-5, atol=1e-6)
    denoised = c.denoised(x.double().sin(), noisy, sigma)
    expected = (c.weight(sigma) * (denoised - clean) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)


def test_noise_levels_are_log_normal() -> None:
    objective = EDMObjective(num_classes=10, p_mean=-0.8, p_std=1.1, stratified=False)
    logs = objective.sigmas(RowKeys(0, torch.arange(20_000), 0)).log()
    assert abs(logs.mean() + 0.8) < 4 * 1.1 / 20_000**0.5
    assert abs(logs.std() - 1.1) < 4 * 1.1 / 40_000**0.5


def test_noise_levels_are_stratified() -> None:
    """One of the K rows of an example lies in each of K equally probable ranges, also where they come in parts."""
    objective, k = EDMObjective(num_classes=10), 8
    normal = torch.distributions.Normal(-1.2, 1.2)
    chosen = keys(augmult=k)
    level = normal.cdf(objective.sigmas(chosen).log())
    assert torch.equal((level * k).floor().long(), torch.arange(k).repeat(3))
    parts = torch.cat([objective.sigmas(chosen.part(first, 4)).view(3, 4) for first in (0, 4)], 1)
    assert torch.equal(parts.flatten(), objective.sigmas(chosen))


def test_no_row_is_without_noise(monkeypatch) -> None:
    """Uniform numbers are 0 once in 2**24."""
    monkeypatch.setattr(RowKeys, "uniform", lambda self, *shape, stream: torch.zeros(self.rows, *shape))
    sigma = EDMObjective(num_classes=10).sigmas(keys())
    assert (sigma > 1e-4).all()


def test_what_does_not_fit_is_refused(fonts) -> None:
    for options, message in [
        ({"p_std": 0.0}, r"p_std=0\.0"),
        ({"p_mean": math.nan}, "p_mean=nan"),
        ({"label_drop": 2.0}, "label_drop"),
    ]:
        with pytest.raises(ConfigError, match=message):
            EDMObjective(num_classes=10, **options)
    with pytest.raises(ConfigError, match=r"sigma_data=-1\.0"):
        Preconditioning(-1.0)
    with pytest.raises(DataError, match=r"EDMObjective: images are torch\.float32"):
        EDMObjective(num_classes=10)(Recorder(), fonts.images[:3] / 255, fonts.labels[:3], keys())


def test_a_private_step_agrees_with_the_oracle(fonts) -> None:
    B, K, C = 3, 4, 0.05
    model = build_unet(UNetSpec(widths=(8, 8), norm_groups=4), seed=0)
    objective, chosen, recorder = EDMObjective(num_classes=10, label_drop=0.2), keys(K), Recorder()
    objective(recorder, fonts.images[:B], fonts.labels[:B], chosen)
    clean = to_signed(fonts.images[:B]).repeat_interleave(K, 0)
    sigma = objective.sigmas(chosen)[:, None, None, None].float()
    target = objective.preconditioning.target(clean, chosen.normal(*clean.shape[1:], stream="noise"), sigma)

    def losses(m, rows):
        x, t, labels, target = rows
        return (m(x, t, labels).sample - target).square().flatten(1).mean(1)

    rows, settings = (*recorder.asked[0], target), {"augmult": K, "max_grad_norm": C}
    exact = per_example(model, losses, rows, **settings)
    plain = per_example(model, losses, rows, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings)
    plan = Plan(dataset_size=10, expected_batch_size=B, max_grad_norm=C, steps=1, target_epsilon=8, target_delta=1e-2)
    optimizer = DPOptimizer(torch.optim.SGD(clipper.parameters.values(), lr=0.1), plan, clipper)
    with clipper:
        norms = clipper.backward(objective(model, fonts.images[:B], fonts.labels[:B], chosen)).norms
    sums = {name: p.grad.clone() for name, p in clipper.parameters.items()}
    assert_as_good_as_torch(Clipped(norms, sums), plain, exact)
    optimizer.step()
    assert optimizer.steps_taken == 1


# Heun's method


def gaussian(mean, std):
    """The ideal denoiser of normally distributed pixels."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def exact(noise, sampler: HeunSampler, mean, std):
    """The flow of that denoiser solved to sigma_min, then one step to D."""
    low, high = sampler.sigma_min, sampler.sigma_max
    at_low = mean + (noise * high - mean) * math.sqrt((std**2 + low**2) / (std**2 + high**2))
    return gaussian(mean, std)(at_low, low)


def test_noise_levels_of_the_sampler() -> None:
    levels = HeunSampler(steps=18).sigmas()
    assert levels.shape == (19,)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(levels[:-1], torch.tensor(expected, dtype=torch.float64))
    assert levels[-1] == 0


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.3, 0.2), (-0.7, 1.0)])
def test_samples_of_a_gaussian_have_its_mean_and_variance(mean, std) -> None:
    """Started from those that noisy data have at sigma_max; the sampler itself takes them for 0 and sigma_max^2."""
    torch.manual_seed(0)
    sampler, noise = HeunSampler(steps=500), torch.randn(1000, dtype=torch.float64)
    noise = mean + (noise - noise.mean()) / noise.std() * math.hypot(std, sampler.sigma_max)
    samples = sampler.sample(gaussian(mean, std), noise / sampler.sigma_max)
    assert abs(samples.mean() - mean) < 1e-9
    assert abs(samples.std() / std - 1) < 3e-4  # a second-order method in 500 steps; sigma_min is 0.01 of std = 0.2


def test_error_falls_fourfold_when_steps_double() -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = []
    for steps in (32, 64, 128, 256):
        sampler = HeunSampler(steps=steps)
        error = sampler.sample(gaussian(0.3, 0.5), noise) - exact(noise, sampler, 0.3, 0.5)
        found.append(error.abs().max().item())
    ratios = [before / after for before, after in itertools.pairwise(found)]
    assert all(3.6 < ratio < 4.6 for ratio in ratios), ratios


def test_one_point_is_found_in_two_steps() -> None:
    """D is constant, the flow a straight line."""
    samples = HeunSampler(steps=2).sample(lambda x, sigma: torch.full_like(x, 0.25), torch.randn(5))
    torch.testing.assert_close(samples, torch.full((5,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_calls_and_churn(churn) -> None:
    """2 N - 1 calls; churn draws from its generator and leaves the distribution as it is."""
    sampler, asked = HeunSampler(steps=160, s_churn=churn, s_tmin=0.01, s_tmax=10.0), []
    denoise = gaussian(0.3, 0.5)

    def counted(x, sigma):
        asked.append(sigma)
        return denoise(x, sigma)

    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, again, other = (sampler.sample(counted, noise, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert sampler.calls == 319
    assert len(asked) == 3 * 319
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (churn == 0)
    assert abs(first.mean() - 0.3) < 4 * 0.5 / 20_000**0.5
    assert abs(first.std() - 0.5) < 4 * 0.5 / 40_000**0.5


def test_churn_raises_the_level_as_the_paper_says() -> None:
    asked = []
    sampler = HeunSampler(steps=10, s_churn=3.0, s_tmin=0.01, s_tmax=10.0)
    sampler.sample(lambda x, sigma: (asked.append(sigma), x * 0)[1], torch.zeros(1), torch.Generator())
    levels = sampler.sigmas().tolist()
    inside = [0.01 <= level <= 10 for level in levels[:-1]]
    assert any(inside)
    assert not all(inside)
    expected = [level * (1.3 if churned else 1.0) for level, churned in zip(levels, inside, strict=False)]
    torch.testing.assert_close(asked[::2], expected)
    capped = HeunSampler(steps=10, s_churn=100.0)
    asked.clear()
    capped.sample(lambda x, sigma: (asked.append(sigma), x * 0)[1], torch.zeros(1), torch.Generator())
    assert asked[0] == pytest.approx(80 * math.sqrt(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1: expected 2 or more"),
        ({"sigma_min": 0.0}, r"0 < sigma_min < sigma_max, got 0\.0 and 80\.0"),
        ({"rho": 0.0}, "rho"),
        ({"s_churn": -1.0}, "s_churn"),
    ],
)
def test_samplers_that_cannot_be(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        HeunSampler(**options)


# diffusers


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_diffusers_scheduler_takes_eulers_steps_of_the_same_denoiser(sigma_data) -> None:
    """What it asks the network, the image it makes of the answer and the step to the next level, at every level."""
    torch.manual_seed(0)
    c, sampler = Preconditioning(sigma_data), HeunSampler(steps=6)
    scheduler = edm_scheduler(c, sampler)
    scheduler.set_timesteps(6)
    x = 80 * torch.randn(3, *SHAPE)
    for t, (sigma, after) in zip(scheduler.timesteps, itertools.pairwise(sampler.sigmas()), strict=True):
        torch.testing.assert_close(t, c.c_noise(sigma).float())
        asked = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(asked, (c.c_in(sigma) * x.double()).float())
        denoised = c.denoised(asked.sin().double(), x.double(), sigma)
        euler = x + (after - sigma) * (x - denoised) / sigma
        step = scheduler.step(asked.sin(), t, x)
        torch.testing.assert_close(step.pred_original_sample, denoised.float())
        torch.testing.assert_close(step.prev_sample, euler.float())
        x = step.prev_sample


def test_heuns_method_over_diffusers_scheduler_draws_the_same_images() -> None:
    model, labels = build_unet(UNetSpec(widths=(8, 8), norm_groups=4), seed=0).eval(), torch.arange(6)
    c, sampler = Preconditioning(0.3), HeunSampler(steps=6)
    scheduler = edm_scheduler(c, sampler)

    def denoise(x, level):
        sigma = torch.tensor(level)
        output = model(scheduler.precondition_inputs(x.float(), sigma), scheduler.precondition_noise(sigma), labels)
        return scheduler.precondition_outputs(x.float(), output.sample, sigma).double()

    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = sampler.sample(denoise, noise)
    ours = generate_edm(
        model, labels, image_shape=(1, 8, 8), num_classes=10, sampler=sampler, preconditioning=c, seed=1
    )
    levels = (theirs.clamp(-1, 1) + 1) * 127.5
    assert ours.double().std() > 10  # images, not one grey
    assert (ours - levels).abs().max() <= 0.5 + 1e-2  # rounded to the nearest


# Images


def test_images_of_a_network() -> None:
    """F = 0 is the ideal network of pixels with mean 0 and standard deviation sigma_data."""
    sampler = HeunSampler(steps=100)
    images = generate_edm(Recorder(), torch.arange(400) % 2, image_shape=SHAPE, num_classes=2, sampler=sampler)
    pixels = to_signed(images).double()
    assert images.dtype == torch.uint8
    n = pixels.numel()
    assert abs(pixels.mean()) < 4 * 0.5 / n**0.5
    clipped = 0.4797  # standard deviation of half a normal number, kept within -1..1
    assert abs(pixels.std() - clipped) < 4 * 0.5 / (2 * n) ** 0.5


def test_labels_guidance_and_seeds() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1])

    class Levels(nn.Module):
        """D = the level of the label: a class is one constant image."""

        def __init__(self):
            super().__init__()
            self.levels, self.calls = nn.Parameter(torch.tensor([-0.5, 0.5, 0.0])), []

        def forward(self, x, t, y):
            assert not self.training
            self.calls.append(len(x))
            c, sigma = Preconditioning(), (4 * t).exp()[:, None, None, None]
            return (self.levels[y][:, None, None, None] - c.c_skip(sigma) * x / c.c_in(sigma)) / c.c_out(sigma)

    for guidance, rows in ((1.0, [2, 2, 1]), (1.5, [4, 4, 2])):
        model = Levels()
        state = torch.get_rng_state()
        images = generate_edm(
            model,
            labels,
            image_shape=SHAPE,
            num_classes=2,
            sampler=HeunSampler(steps=4),
            guidance=guidance,
            batch_size=2,
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert model.calls == [n for n in rows for _ in range(7)]
        level = torch.where(labels == 0, -0.5, 0.5) * guidance
        expected = ((level + 1) * 127.5)[:, None, None, None].expand(-1, *SHAPE)
        assert (images - expected).abs().max() <= 1

    def sample(seed, **options):
        return generate_edm(Recorder(), labels, image_shape=SHAPE, num_classes=2, seed=seed, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    churn = HeunSampler(s_churn=10.0)
    assert torch.equal(sample(1, sampler=churn), sample(1, sampler=churn))
    assert not torch.equal(sample(1, sampler=churn), sample(1))
    assert generate_edm(Recorder(), labels[:0], image_shape=SHAPE, num_classes=2).shape == (0, *SHAPE)


def test_shards_are_balanced_and_made_once(tmp_path) -> None:
    settings = {"count": 10, "shard_size": 4, "image_shape": SHAPE, "classes": ("a", "b"), "seed": 1}
    first = generate_edm_shards(Recorder(), tmp_path, **settings).load()
    assert first.labels.bincount().tolist() == [5, 5]
    model = Recorder()
    assert generate_edm_shards(model, tmp_path, **settings).load().fingerprint() == first.fingerprint()
    assert not model.asked
    assert load_shards(tmp_path).fingerprint() == first.fingerprint()
    with pytest.raises(DataError, match="sampler"):
        generate_edm_shards(model, tmp_path, **settings, sampler=HeunSampler(steps=20))
    with pytest.raises(ConfigError, match="multiple of the 2 classes"):
        generate_edm_shards(model, tmp_path / "odd", **{**settings, "count": 5})
