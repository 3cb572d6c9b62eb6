"""Diffusion: timesteps, losses per row, networks, public pre-training, sampling."""

from dpfast.diffusion.edm import EDMObjective, generate_edm
from dpfast.diffusion.loading import load_unet, relabel
from dpfast.diffusion.models import NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.objective import DiffusionObjective
from dpfast.diffusion.sampler import generate, generate_shards
from dpfast.diffusion.timesteps import MixtureOfUniforms, TimestepDistribution, Uniform

__all__ = [
    "DiffusionObjective",
    "EDMObjective",
    "MixtureOfUniforms",
    "NoiseSpec",
    "TimestepDistribution",
    "UNetSpec",
    "Uniform",
    "build_scheduler",
    "build_unet",
    "generate",
    "generate_edm",
    "generate_shards",
    "load_unet",
    "relabel",
]
