"""What is measured: models with their inputs and losses, and the rows of the table in the README."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    """A network and ``inputs(N)`` for it: noised images, timesteps, labels. The loss is the diffusion loss per row."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    channels: int

    def inputs(self, rows: int) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(rows, self.channels, self.size, self.size, generator=generator)
        timesteps = torch.randint(0, 1000, (rows,), generator=generator)
        return images, timesteps, torch.randint(0, 10, (rows,), generator=generator)


def losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """Squared error per row, ``[N]``, of predicting the input itself: what the target is does not matter for speed."""
    out = model(*inputs).sample
    return (out.float() - inputs[0]).square().flatten(1).mean(1)


def _unet(**settings: object) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(num_class_embeds=11, **settings)


def unet6m() -> nn.Module:
    """6.1M parameters, 32x32, attention in the middle stage."""
    return _unet(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )


def digits() -> nn.Module:
    """The network of the digits recipe: 68k parameters, 8x8."""
    from dpfast.diffusion.models import UNetSpec, build_unet
    from dpfast.recipes import load

    return build_unet(UNetSpec(num_classes=10, **vars(load("digits", []).model)), seed=0)


MODELS = {model.name: model for model in (Model("unet6m", unet6m, 32, 3), Model("digits", digits, 8, 1))}


@dataclass(frozen=True)
class Row:
    """One row of the table. ``time`` and ``memory``: what is to be reached, relative to the non-private step."""

    model: str
    examples: int
    augmult: int
    dtype: str = "float32"
    time: float = 1.10
    memory: float = 1.10

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} B={self.examples} K={self.augmult}"


ROWS = (
    Row("unet6m", 8, 1, time=1.20, memory=1.15),
    Row("unet6m", 8, 4),
    Row("unet6m", 4, 16),
    Row("unet6m", 1, 128, time=1.05, memory=1.05),
    Row("unet6m", 8, 4, "bfloat16", time=1.15, memory=1.15),
    Row("digits", 64, 8, time=1.15, memory=1.15),
)
