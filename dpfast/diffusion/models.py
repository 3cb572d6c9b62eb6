"""Networks and noise schedules from diffusers, described by plain values that a recipe can hold."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dpfast.errors import ConfigError
from dpfast.seeding import seeded

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """A class-conditional UNet2DModel with ``num_classes + 1`` class embeddings (the last is the null class).

    widths: channels of each resolution, halving from one to the next; attention: resolutions (indices into widths)
    with self-attention. scale_shift: the timestep scales and shifts what a residual block's second norm gives
    ("adaptive group normalization"), instead of being added before it. resblock_updown: residual blocks change the
    resolution, not convolutions. Both as in ADM (Dhariwal and Nichol, arXiv 2105.05233, section 3).
    """

    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    widths: tuple[int, ...] = (16, 32)
    layers_per_block: int = 1
    norm_groups: int = 8
    attention: tuple[int, ...] = ()
    mid_attention: bool = False
    attention_head_dim: int = 8
    dropout: float = 0.0
    scale_shift: bool = False
    resblock_updown: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.widths or any(width % self.norm_groups for width in self.widths):
            problems.append(f"widths {self.widths} must be multiples of norm_groups={self.norm_groups}")
        if self.image_size % 2 ** max(0, len(self.widths) - 1):
            problems.append(f"image_size={self.image_size} cannot be halved {len(self.widths) - 1} times")
        if any(level not in range(len(self.widths)) for level in self.attention):
            problems.append(f"attention {self.attention} must name levels 0..{len(self.widths) - 1}")
        attended = {self.widths[level] for level in self.attention if level in range(len(self.widths))}
        attended |= set(self.widths[-1:]) if self.mid_attention else set()
        if self.attention_head_dim < 1 or any(width % self.attention_head_dim for width in attended):
            problems.append(
                f"attended widths {sorted(attended)} must be multiples of attention_head_dim={self.attention_head_dim}"
            )
        if problems:
            raise ConfigError("UNet cannot be built: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """The forward process: diffusers' names for the schedule of betas and for what the model predicts."""

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"


def build_unet(spec: UNetSpec, *, seed: int) -> "UNet2DModel":
    """The network with weights drawn from ``seed``; torch's global generator is left as it was."""
    from diffusers import UNet2DModel

    with seeded(seed):
        return UNet2DModel(**unet_config(spec))


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The arguments of diffusers' UNet2DModel."""
    levels = range(len(spec.widths))
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if spec.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    resampling = "resnet" if spec.resblock_updown else "conv"  # of the blocks with attention
    return {
        "sample_size": spec.image_size,
        "in_channels": spec.channels,
        "out_channels": spec.channels,
        "block_out_channels": spec.widths,
        "down_block_types": tuple("AttnDownBlock2D" if level in spec.attention else down for level in levels),
        "up_block_types": tuple("AttnUpBlock2D" if level in spec.attention else up for level in reversed(levels)),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "layers_per_block": spec.layers_per_block,
        "norm_num_groups": spec.norm_groups,
        "attn_norm_num_groups": spec.norm_groups,  # else attention in the middle has no norm beside scale_shift
        "resnet_time_scale_shift": "scale_shift" if spec.scale_shift else "default",
        "add_attention": spec.mid_attention,
        "attention_head_dim": spec.attention_head_dim,
        "dropout": spec.dropout,
        "num_class_embeds": spec.num_classes + 1,
    }


def build_scheduler(spec: NoiseSpec) -> "DDPMScheduler":
    """The training scheduler; samplers are derived from its config. Data lie in -1..1, so samples are clipped."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=spec.num_train_timesteps,
        beta_schedule=spec.beta_schedule,
        prediction_type=spec.prediction_type,
        clip_sample=True,
        clip_sample_range=1.0,
    )


# Presets; tests count their parameters. "More than 80M parameters" and ImageNet pre-training are the paper's (arXiv
# 2302.13861). Its layers were not at hand: those of ADM_32 are ADM's (arXiv 2105.05233) for 32x32 images, but for
# scale_shift and resblock_updown: ``replace(ADM_32, scale_shift=True, resblock_updown=True)`` has 99.3M.

# 83.4M: 192 channels at 32x32, two residual blocks at each resolution, attention at 16 and 8.
ADM_32 = UNetSpec(
    image_size=32,
    channels=3,
    widths=(192, 384, 384, 384),
    layers_per_block=2,
    norm_groups=32,
    attention=(1, 2),
    mid_attention=True,
    attention_head_dim=64,
)
CIFAR10 = ADM_32
CAMELYON17 = replace(ADM_32, num_classes=2)

# 4.0M, to be trained from scratch: attention at 14 and 7. That the paper's MNIST model has some 4M is unverified.
MNIST = UNetSpec(
    image_size=28,
    widths=(32, 64, 128),
    layers_per_block=2,
    attention=(1, 2),
    mid_attention=True,
    attention_head_dim=32,
)
