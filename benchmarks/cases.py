"""What is measured: models with their inputs and losses, and the rows of the table in the README."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def unet(width: int, size: int) -> nn.Module:
    """Three stages of ``width`` and twice that many channels, attention in the middle; 6.1M parameters at 64."""
    return _unet(
        sample_size=size,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )


def adm_unet() -> nn.Module:
    """The paper's: 83.4M parameters."""
    from dpfast.diffusion.models import ADM_32, build_unet

    return build_unet(ADM_32, seed=0)


def digits() -> nn.Module:
    """The network of the digits recipe: 68k parameters, 8x8."""
    from dpfast.diffusion.models import UNetSpec, build_unet
    from dpfast.recipes import load

    return build_unet(UNetSpec(num_classes=10, **vars(load("digits", []).model)), seed=0)


WIDTHS = {f"unet-w{width}": width for width in (32, 64, 128)}
MODELS = {
    "unet6m": Model("unet6m", partial(unet, 64, 32), 32, 3),
    "unet83m": Model("unet83m", adm_unet, 32, 3),
    "digits": Model("digits", digits, 8, 1),
    **{name: Model(name, partial(unet, width, 16), 16, 3) for name, width in WIDTHS.items()},
}


@dataclass(frozen=True)
class Row:
    """One row of the table. ``time`` and ``memory``: what is to be reached, relative to the non-private step."""

    model: str
    examples: int
    augmult: int
    dtype: str = "float32"
    time: float = 1.10
    memory: float = 1.10
    memory_budget: int | None = None

    @property
    def name(self) -> str:
        within = "" if self.memory_budget is None else f" within {self.memory_budget:,} bytes"
        return f"{self.model} {self.dtype} B={self.examples} K={self.augmult}{within}"


ROWS = (
    Row("unet6m", 8, 1, time=1.20, memory=1.15),
    Row("unet6m", 8, 4),
    Row("unet6m", 4, 16),
    Row("unet6m", 1, 128, time=1.05, memory=1.05),
    Row("unet6m", 8, 4, "bfloat16", time=1.15, memory=1.15),
    Row("digits", 64, 8, time=1.15, memory=1.15),
)


SWEEP_TAG = "sweep"  # of the rows that are drawn


def _sweep(*sizes: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(Row("unet-w32", examples, augmult) for examples, augmult in sizes)


# What the figures show: one thing grows in each. Rows B * K grow by B and K in turns.
SWEEPS = {
    "rows": _sweep((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16)),
    "examples": _sweep(*((b, 1) for b in (1, 2, 4, 8, 16, 32, 64))),
    "augmult": _sweep(*((4, k) for k in (1, 2, 4, 8, 16, 32))),
    "width": tuple(Row(name, 4, 4) for name in WIDTHS),
}
