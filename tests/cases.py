"""Models as people write them, one use of a parameter each (or a few), with inputs for N rows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    slow_rule: bool = False  # goes through the vmapped fallback, which says so

    def build(self, rows: int, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model(), self.inputs(rows)


def losses(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    """One loss per row that is neither linear nor symmetric in the output."""
    out = model(*rows)
    out = out.sample if hasattr(out, "sample") else out
    weight = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out.shape[1:])
    return (out.sin() * weight + 0.3 * out.square()).flatten(1).mean(1)


class Raw(nn.Module):
    """A module made of parameters and a forward function."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)))
        self.function = forward

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self, *x)


def floats(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape),)


def indices(high: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, high, (n, *shape)),)


def in_place_bias(m, x):
    h = F.conv2d(x, m.weight, padding=1)
    h += m.bias.view(1, -1, 1, 1)
    return h


def in_place_on_a_view(m, x):
    h = F.linear(x, m.weight)
    h[:, :3].add_(m.bias)
    return h


def standardised(m, x):
    w = m.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return F.conv2d(x, w, m.bias, padding=1)


def class_token(m, x):
    tokens = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1)
    return F.linear(tokens + m.position, m.weight)


def raw_attention(m, x):
    q, k, v = F.linear(x, m.qkv).chunk(3, dim=-1)
    return F.linear(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0], m.out)


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))


def twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied_embedding(m, x):
    return F.linear(F.embedding(x, m.table), m.table)


def frozen_half() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 4))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        h = self.first(x)
        return self.last(checkpoint(lambda h: self.inner(h.tanh()).sin(), h, use_reentrant=self.use_reentrant))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        out, weights = self.attention(x, x, x, average_attn_weights=False)
        return out + weights.square().sum((1, 3)).unsqueeze(-1)


def diffusers_attention() -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(query_dim=8, heads=2, dim_head=4, bias=True, norm_num_groups=2, residual_connection=True)


CONVOLUTIONS = [
    Case("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), floats(4, 9)),
    Case("conv2d", lambda: nn.Conv2d(3, 5, 3, padding=1), floats(3, 6, 7)),
    Case("conv2d-1x1", lambda: nn.Conv2d(6, 4, 1), floats(6, 4, 4)),
    Case("conv2d-grouped", lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), floats(6, 5, 5)),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), floats(4, 6, 6)),
    Case("conv2d-strided", lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), floats(3, 7, 8)),
    Case("conv2d-dilated", lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=(2, 1)), floats(3, 8, 8)),
    Case("conv2d-odd", lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 3), bias=False), floats(3, 7, 9)),
    Case("conv2d-same-even", lambda: nn.Conv2d(3, 4, 4, padding="same"), floats(3, 6, 6)),
    Case("conv2d-reflect", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), floats(3, 6, 6)),
    Case("conv2d-circular", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), floats(3, 6, 6)),
    Case("conv2d-replicate", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), floats(3, 6, 6)),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 3, padding=1, stride=(1, 2, 1)), floats(2, 4, 5, 4)),
    Case("conv2d-one-position", lambda: nn.Conv2d(3, 4, 4), floats(3, 4, 4)),
    Case("conv-transpose1d", lambda: nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), floats(3, 6)),
    Case(
        "conv-transpose2d",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        floats(4, 4, 5),
    ),
    Case("conv-transpose2d-dilated", lambda: nn.ConvTranspose2d(3, 2, 3, dilation=2, stride=3), floats(3, 4, 4)),
    Case("conv-transpose3d", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), floats(2, 3, 3, 2)),
    Case("conv2d-large", lambda: nn.Conv2d(32, 64, 3, padding=1), floats(32, 16, 16)),
]

LAYERS = [
    Case("linear", lambda: nn.Linear(5, 6), floats(5)),
    Case("linear-3d", lambda: nn.Linear(5, 6), floats(7, 5)),
    Case("linear-4d", lambda: nn.Linear(5, 3), floats(2, 4, 5)),
    Case("linear-no-bias", lambda: nn.Linear(5, 6, bias=False), floats(7, 5)),
    Case("group-norm", lambda: affine(nn.GroupNorm(2, 6)), floats(6, 4, 5)),
    Case("group-norm-1d", lambda: affine(nn.GroupNorm(3, 6)), floats(6)),
    Case("instance-norm", lambda: affine(nn.InstanceNorm2d(4, affine=True)), floats(4, 5, 5)),
    Case("layer-norm", lambda: affine(nn.LayerNorm(6)), floats(5, 6)),
    Case("layer-norm-2d", lambda: affine(nn.LayerNorm((4, 6))), floats(3, 4, 6)),
    Case("rms-norm", lambda: affine(nn.RMSNorm(6)), floats(5, 6)),
    Case("batch-norm-eval", lambda: affine(nn.BatchNorm2d(4)).eval(), floats(4, 5, 5)),
    Case("embedding", lambda: nn.Embedding(9, 4), indices(9, 5)),
    Case("embedding-one-index", lambda: nn.Embedding(9, 4, padding_idx=2), indices(4)),
]

PATTERNS = [
    Case("attention-of-diffusers", diffusers_attention, floats(8, 3, 3)),
    Case("raw-attention", lambda: Raw(raw_attention, qkv=(12, 4), out=(5, 4)), floats(6, 4)),
    Case("bias-in-place", lambda: Raw(in_place_bias, weight=(4, 3, 3, 3), bias=(4,)), floats(3, 5, 5)),
    Case("bias-in-place-on-a-view", lambda: Raw(in_place_on_a_view, weight=(6, 4), bias=(3,)), floats(4)),
    Case("relu-in-place", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), floats(3, 5, 5)),
    Case("multiply-in-place", lambda: Raw(lambda m, x: x.sin().mul_(m.scale), scale=(6,)), floats(3, 6)),
    Case("multiply", lambda: Raw(lambda m, x: m.scale * x, scale=(3, 1)), floats(4, 3, 6)),
    Case("multiply-one-number", lambda: Raw(lambda m, x: x * m.scale.exp(), scale=()), floats(4, 3)),
    Case("subtract", lambda: Raw(lambda m, x: (m.shift - x) * (x - m.scale), shift=(6,), scale=(2, 1)), floats(2, 6)),
    Case("add-alpha", lambda: Raw(lambda m, x: torch.add(x, m.shift, alpha=-2.5), shift=(6,)), floats(2, 6)),
    Case("matmul", lambda: Raw(lambda m, x: x @ m.weight, weight=(5, 3)), floats(4, 5)),
    Case("weight-scaled", lambda: Raw(lambda m, x: F.linear(x, m.w * 0.3, m.b), w=(6, 5), b=(6,)), floats(4, 5)),
    Case("weight-masked", lambda: Raw(lambda m, x: F.linear(x, m.w * m.mask), w=(6, 6)), floats(6)),
    Case("weight-standardised", lambda: Raw(standardised, weight=(4, 3, 3, 3), bias=(4,)), floats(3, 5, 5)),
    Case("weight-transposed", lambda: Raw(lambda m, x: F.linear(x, m.w.t()), w=(5, 3)), floats(4, 5)),
    Case("weights-joined", lambda: Raw(lambda m, x: F.linear(x, torch.cat([m.q, m.k])), q=(2, 5), k=(3, 5)), floats(5)),
    Case("weight-norm", weight_norm, floats(5)),
    Case("used-twice", twice, floats(6)),
    Case("tied-embedding", lambda: Raw(tied_embedding, table=(7, 4)), indices(7, 3)),
    Case("frozen-half", frozen_half, floats(5)),
    Case("positions-by-index", lambda: Raw(lambda m, x: x + m.p[torch.arange(4)], p=(9, 5)), floats(4, 5)),
    Case("positions-embedded", lambda: Raw(lambda m, x: x + F.embedding(torch.arange(6), m.p), p=(9, 5)), floats(6, 5)),
    Case("table-by-label", lambda: Raw(lambda m, y: m.table[y], table=(7, 4)), indices(7)),
    Case("class-token", lambda: Raw(class_token, token=(1, 1, 4), position=(5, 4), weight=(3, 4)), floats(4, 4)),
    Case("einsum", lambda: Raw(lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.w), w=(3, 5)), floats(3, 4, 4)),
    Case("divide", lambda: Raw(lambda m, x: x / (2 + m.scale.square()), scale=(6,)), floats(3, 6)),
    Case("where", lambda: Raw(lambda m, x: torch.where(x > 0, x, m.fill), fill=(6,)), floats(3, 6)),
    Case("bilinear", lambda: nn.Bilinear(4, 3, 5), lambda n: (torch.randn(n, 4), torch.randn(n, 3))),
    Case("power", lambda: Raw(lambda m, x: (x.abs() + 0.5) ** m.power, power=(6,)), floats(3, 6), True),
    Case("checkpointed", lambda: Checkpointed(use_reentrant=False), floats(4)),
    Case("multi-head-attention", SelfAttention, floats(3, 4)),
    Case("transformer-layer", lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), floats(3, 4)),
    Case("prelu", lambda: nn.PReLU(3), floats(3, 4)),
]

EVERY = [*LAYERS, *CONVOLUTIONS, *PATTERNS]


def affine(norm: nn.Module) -> nn.Module:
    """A norm whose affine parameters are not those of its initialisation."""
    for p in norm.parameters():
        nn.init.normal_(p)
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def unet(**changes) -> nn.Module:
    """A small class-conditional diffusers UNet with attention in its lowest stage and in the middle."""
    from diffusers import UNet2DModel

    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "num_class_embeds": 11,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**settings, **changes})


def unet_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 1, 8, 8), torch.randint(0, 1000, (n,)), torch.randint(0, 11, (n,))


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; numbers of no use (NaN, the index -1) lie between those of a slice."""
    if layout == "channels_last":
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
        return (
            x.contiguous(memory_format=memory_format)
            if memory_format
            else x.transpose(0, -1).contiguous().transpose(0, -1)
        )
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 2 else x.t().contiguous().t()
    if layout == "sliced":
        between = float("nan") if x.is_floating_point() else -1
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), between, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    assert layout == "contiguous"
    return copy.copy(x).contiguous()


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]
