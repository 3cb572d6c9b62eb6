"""EDM beside DDPM and DDIM: Karras et al., arXiv 2206.00364, with sigma(t) = t and s(t) = 1.

An image y in -1..1 and noise of standard deviation sigma make ``x = y + sigma eps``. The network F is any ``model(x, t,
labels)``, the denoiser ``D(x; sigma)`` what the preconditioning makes of it. In the place of the timestep stands
``c_noise = ln(sigma) / 4``, a fraction: a network that was trained on the timesteps of DDPM has to learn it anew.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpfast.checkpoint import weights_fingerprint
from dpfast.data.images import to_signed
from dpfast.data.keyed import RowKeys
from dpfast.data.shards import ShardFolder
from dpfast.diffusion.objective import ImageObjective, predict
from dpfast.diffusion.sampler import fill_shards, guided, in_batches
from dpfast.diffusion.timesteps import draw_levels
from dpfast.errors import ConfigError
from dpfast.progress import Progress, silent
from dpfast.ranks import Ranks

if TYPE_CHECKING:
    from diffusers import EDMEulerScheduler

_LEAST_LEVEL = 2.0**-32  # of a uniform number: 0 would be no noise at all


@dataclass(frozen=True)
class Preconditioning:
    """``D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)`` (eq. 7, table 1), which gives F inputs and targets of unit
    variance where pixels have the standard deviation ``sigma_data``.

    Each function takes sigma, of any shape, and gives the same shape. ``weight`` is lambda(sigma) = 1 / c_out^2.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ConfigError(f"sigma_data={self.sigma_data!r}: expected a positive, finite number")

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / self._variance(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / self._variance(sigma).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return self._variance(sigma).rsqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        return self._variance(sigma) / (sigma * self.sigma_data).square()

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What F should give: ``(y - c_skip (y + sigma eps)) / c_out`` (eq. 8), written so that nothing cancels."""
        return (sigma / self.sigma_data * clean - self.sigma_data * noise) * self.c_in(sigma)

    def denoised(self, output: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """D of F's output and its input before c_in."""
        return self.c_skip(sigma) * noisy + self.c_out(sigma) * output

    def _variance(self, sigma: Tensor) -> Tensor:
        """Of noisy pixels."""
        return sigma.square() + self.sigma_data**2


@dataclass(frozen=True, kw_only=True)
class EDMObjective(ImageObjective):
    """An ``Objective``: ``(model, images, labels, keys) -> losses [B * K]``, with a sigma for each row.

    p_mean, p_std: of ln(sigma), which is normally distributed; stratified over the K rows of an example, as timesteps.
    The other fields are those of ``ImageObjective``.
    """

    preconditioning: Preconditioning = field(default_factory=Preconditioning)
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.p_mean) and 0 < self.p_std < math.inf):
            raise ConfigError(f"p_mean={self.p_mean!r}, p_std={self.p_std!r}: expected finite numbers, p_std positive")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, keys: RowKeys) -> Tensor:
        """Images uint8 ``[B, C, H, W]``, labels int64 ``[B]`` -> ``lambda(sigma) |D(x; sigma) - y|^2`` per row, mean
        over pixels, ``[N]``. lambda makes that F's own squared error, which is computed.

        Raises ``DataError`` for other images and labels, or a model that cannot take these labels.
        """
        self._check(model, images, labels)
        clean = self.augment(to_signed(images), keys)
        noise = keys.normal(*clean.shape[1:], stream="noise")
        sigma = self.sigmas(keys).to(clean.dtype)
        c_noise, sigma = self.preconditioning.c_noise(sigma), sigma[:, None, None, None]
        inputs = self.preconditioning.c_in(sigma) * (clean + sigma * noise)
        output = predict(model, inputs, c_noise, self.drop_labels(labels, keys))
        return (output - self.preconditioning.target(clean, noise, sigma)).square().flatten(1).mean(1)

    def sigmas(self, keys: RowKeys) -> Tensor:
        """float64 ``[N]``: ``exp(p_mean + p_std z)``, z the standard normal quantile of the row's level."""
        levels = draw_levels(keys, stratified=self.stratified).clamp(min=_LEAST_LEVEL)
        return (self.p_mean + self.p_std * torch.special.ndtri(levels)).exp()


@dataclass(frozen=True, kw_only=True)
class HeunSampler:
    """Heun's second-order method on the probability flow (algorithm 1).

    sigma_min, sigma_max, rho: the noise levels (eq. 5). s_churn, s_tmin, s_tmax, s_noise: noise that is added on the
    way (algorithm 2); without churn samples are a function of the noise they start from.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 2:
            problems.append(f"steps={self.steps}: expected 2 or more")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            problems.append(f"expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not 0 < self.rho < math.inf:
            problems.append(f"rho={self.rho}: expected a positive number")
        if not (self.s_churn >= 0 and self.s_noise >= 0):
            problems.append(f"s_churn={self.s_churn}, s_noise={self.s_noise}: expected 0 or more")
        if problems:
            raise ConfigError("HeunSampler: " + "; ".join(problems))

    @property
    def calls(self) -> int:
        """Of the network: two for each step but the last."""
        return 2 * self.steps - 1

    def sigmas(self) -> Tensor:
        """float64 ``[steps + 1]``, falling from sigma_max to sigma_min, then 0 (eq. 5)."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = torch.linspace(*ends, self.steps, dtype=torch.float64) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)])

    def sample(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples, float64, that start from standard normal ``noise`` of their shape.

        denoise: ``D(x, sigma)``. generator: on the CPU, of the noise that churn adds.
        """
        *sigmas, _ = self.sigmas().tolist()
        x = noise.double() * sigmas[0]
        for level, after in itertools.pairwise(sigmas):
            x, sigma = self._churn(x, level, generator)
            slope = (x - denoise(x, sigma)) / sigma
            euler = x + (after - sigma) * slope
            x = x + (after - sigma) * (slope + (euler - denoise(euler, after)) / after) / 2
        return denoise(*self._churn(x, sigmas[-1], generator))  # where Euler's step to sigma = 0 leads

    def _churn(self, x: Tensor, sigma: float, generator: torch.Generator | None) -> tuple[Tensor, float]:
        """X with more noise, and the level of it."""
        if self.s_churn == 0 or not self.s_tmin <= sigma <= self.s_tmax:
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / self.steps, math.sqrt(2) - 1))
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x + math.sqrt(raised**2 - sigma**2) * self.s_noise * fresh, raised


def edm_scheduler(
    preconditioning: Preconditioning | None = None, sampler: HeunSampler | None = None
) -> "EDMEulerScheduler":
    """Diffusers' scheduler for a network trained by ``EDMObjective``: the same preconditioning and noise levels, and
    for steps those of Euler (with churn as an argument of its ``step``). Its timesteps are c_noise.
    """
    from diffusers import EDMEulerScheduler

    sampler, preconditioning = sampler or HeunSampler(), preconditioning or Preconditioning()
    return EDMEulerScheduler(
        sigma_min=sampler.sigma_min,
        sigma_max=sampler.sigma_max,
        rho=sampler.rho,
        sigma_data=preconditioning.sigma_data,
        prediction_type="epsilon",  # its name for F; "v_prediction" is -F
    )


def generate_edm(
    model: nn.Module,
    labels: Tensor,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    sampler: HeunSampler | None = None,
    preconditioning: Preconditioning | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 500,
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> Tensor:
    """Images uint8 ``[n, *image_shape]`` for ``labels`` int64 ``[n]``, of a network trained by ``EDMObjective``.

    sampler: by default the paper's 18 steps. preconditioning: that of the training. guidance (classifier-free), dtype:
        as ``generate`` has them.
    """
    sampler, preconditioning = sampler or HeunSampler(), preconditioning or Preconditioning()

    def sample(batch: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        network = guided(model, batch, num_classes, guidance, dtype)

        def denoise(x: Tensor, level: float) -> Tensor:
            sigma = torch.full((len(x), 1, 1, 1), level, dtype=x.dtype, device=x.device)
            inputs = (preconditioning.c_in(sigma) * x).to(noise.dtype)
            output = network(inputs, preconditioning.c_noise(sigma).flatten().to(noise.dtype))
            return preconditioning.denoised(output.to(x.dtype), x, sigma)

        return sampler.sample(denoise, noise, generator)

    return in_batches(model, labels, sample, image_shape, seed=seed, batch_size=batch_size, progress=progress)


def generate_edm_shards(
    model: nn.Module,
    folder: str | Path,
    *,
    count: int,
    shard_size: int = 1000,
    image_shape: tuple[int, int, int],
    classes: tuple[str, ...],
    sampler: HeunSampler | None = None,
    preconditioning: Preconditioning | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 500,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,  # noqa: A002 (as in Performance)
    devices: Sequence[str] = (),
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> ShardFolder:
    """``count`` images in a ``ShardFolder``, exactly ``count / len(classes)`` of each class, as ``generate_shards``."""
    sampler, preconditioning = sampler or HeunSampler(), preconditioning or Preconditioning()
    settings = {
        "count": count, "shard_size": shard_size, "image_shape": list(image_shape), "classes": list(classes),
        "sampler": repr(sampler), "preconditioning": repr(preconditioning), "guidance": guidance, "seed": seed,
        "batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "model": weights_fingerprint(model),
    }  # fmt: skip

    def make(network: nn.Module, labels: Tensor, seed: int, report: Progress) -> Tensor:
        return generate_edm(
            network, labels, image_shape=image_shape, num_classes=len(classes), sampler=sampler,
            preconditioning=preconditioning, guidance=guidance, seed=seed, batch_size=batch_size, dtype=dtype,
            progress=report,
        )  # fmt: skip

    return fill_shards(
        model, Path(folder), settings, make, compile=compile, devices=devices, progress=progress, ranks=ranks
    )
