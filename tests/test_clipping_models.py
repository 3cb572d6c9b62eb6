"""Models as others have published them, unchanged, against the oracle; no use of theirs takes the slow way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import Case, floats, losses, unet, unet_inputs
from checks import FORMS, check, clip, fallbacks
from oracle import assert_as_good_as_torch, per_example

# diffusers


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def conditional_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 2, 8, 8), torch.randint(0, 1000, (n,)), torch.randn(n, 3, 6)


def diffusion_transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    settings = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "norm_num_groups": 2}
    model = DiTTransformer2DModel(
        **settings, in_channels=2, out_channels=2, sample_size=4, patch_size=2, num_embeds_ada_norm=10
    )
    return model.eval()  # labels are dropped at random in training


def transformer_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 2, 4, 4), torch.randint(0, 1000, (n,)), torch.randint(0, 10, (n,))


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL with the noise of its latents as an input, and both parts of its loss."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        self.vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            latent_channels=2,
            norm_num_groups=2,
        )

    def forward(self, x, noise):
        posterior = self.vae.encode(x).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return decoded - x + posterior.kl()[:, None, None, None]


def embedded_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 1, 8, 8), torch.randint(0, 1000, (n,)), torch.randn(n, 32)


RESNET = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
SKIP = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}

DIFFUSERS = [
    Case("unet-scale-shift", lambda: unet(resnet_time_scale_shift="scale_shift"), unet_inputs),
    Case("unet-resnet", lambda: unet(down_block_types=RESNET[0], up_block_types=RESNET[1]), unet_inputs),
    Case("unet-resampling-resnets", lambda: unet(downsample_type="resnet", upsample_type="resnet"), unet_inputs),
    Case("unet-class-identity", lambda: unet(class_embed_type="identity"), embedded_inputs),
    Case(
        "unet-skip",
        lambda: unet(**SKIP, time_embedding_type="fourier", in_channels=3, out_channels=3),
        lambda n: (torch.randn(n, 3, 8, 8), torch.randint(1, 1000, (n,)), torch.randint(0, 11, (n,))),
    ),
    Case("unet-conditional", conditional_unet, conditional_inputs),
    Case("transformer", diffusion_transformer, transformer_inputs),
    Case("autoencoder", Autoencoder, lambda n: (torch.randn(n, 1, 8, 8), torch.randn(n, 2, 4, 4))),
]


# guided-diffusion, EDM, NCSN++: their layers, written again


class AttentionWith1dConvolutions(nn.Module):
    """As in ADM: queries, keys and values from one 1-d convolution, products by einsum."""

    def __init__(self, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(4, channels), heads
        self.qkv, self.proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        h = x.reshape(*x.shape[:2], -1)
        n, c, t = h.shape
        qkv = self.qkv(self.norm(h)).reshape(n * self.heads, 3 * c // self.heads, t)
        q, k, v = qkv.split(c // self.heads, 1)
        scale = 1 / math.sqrt(math.sqrt(c // self.heads))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), -1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, t)
        return x + self.proj(h).reshape(x.shape)


class ScaleShiftBlock(nn.Module):
    """ADM's residual block: the embedding scales and shifts what the norm gives."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.emb = nn.Linear(6, 2 * channels)
        self.attention = AttentionWith1dConvolutions(channels)

    def forward(self, x, emb):
        scale, shift = self.emb(F.silu(emb))[..., None, None].chunk(2, 1)
        return self.attention(x + self.conv(F.silu(self.norm(x) * (1 + scale) + shift)))


class Convolution(nn.Module):
    """As in EDM: raw parameters, cast at each use; up or down by a fixed filter, and a convolution if there is one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / kernel) if kernel else None
        self.bias = nn.Parameter(torch.randn(outputs)) if kernel else None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4 if up or down else None)

    def forward(self, x):
        w = self.weight.to(x.dtype) if self.weight is not None else None
        b = self.bias.to(x.dtype) if self.bias is not None else None
        f = self.resample_filter.to(x.dtype) if self.resample_filter is not None else None
        c = x.shape[1]
        if self.up:
            x = F.conv_transpose2d(x, f.mul(4).tile([c, 1, 1, 1]), groups=c, stride=2)
        if self.down:
            x = F.conv2d(x, f.tile([c, 1, 1, 1]), groups=c, stride=2)
        if w is not None:
            x = F.conv2d(x, w, padding=w.shape[-1] // 2)
        return x.add_(b.reshape(1, -1, 1, 1)) if b is not None else x


class RawLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return (x @ self.weight.to(x.dtype).t()).add_(self.bias.to(x.dtype))


class RawGroupNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, 2, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-5)


class RawBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.plain = Convolution(2, 4, 3, down=True), Convolution(4, 4, 1)
        self.up, self.resample = Convolution(4, 2, 3, up=True), Convolution(2, 2, 0, down=True)
        self.norm, self.affine = RawGroupNorm(4), RawLinear(6, 4)

    def forward(self, x, emb):
        h = F.silu(self.norm(self.down(x)).add_(self.affine(emb)[..., None, None]))
        return self.resample(self.up(self.plain(h)) + x)


class NetworkInNetwork(nn.Module):
    """As in NCSN++: a 1x1 convolution as an einsum over the last dimension."""

    def __init__(self, inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return (torch.einsum("abcd,de->abce", x, self.W) + self.b).permute(0, 3, 1, 2)


class StandardisedConvolution(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self._conv_forward(x, w, self.bias)


class LowRank(nn.Module):
    """A frozen layer and a trainable product of two thin matrices beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x)) * self.scale


def low_rank_unet() -> nn.Module:
    model = conditional_unet().requires_grad_(False)
    for module in list(model.modules()):
        if type(module).__name__ == "Attention":
            module.to_q, module.to_k, module.to_v = (LowRank(x) for x in (module.to_q, module.to_k, module.to_v))
    return model


class Decoder(nn.Module):
    """Transposed convolutions, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.ConvTranspose2d(2, 4, 4, 2, 1), nn.ConvTranspose2d(4, 4, 4, 2, 1)

    def forward(self, x):
        return self.again(F.silu(self.again(F.silu(self.first(x))))).mean((2, 3))


LAYERS = [
    Case("adm-block", ScaleShiftBlock, lambda n: (torch.randn(n, 8, 3, 3), torch.randn(n, 6))),
    Case("edm-block", RawBlock, lambda n: (torch.randn(n, 2, 6, 6), torch.randn(n, 6))),
    Case("ncsnpp-nin", NetworkInNetwork, floats(4, 3, 3)),
    Case("standardised", lambda: StandardisedConvolution(3, 4, 3, padding=1), floats(3, 5, 5)),
    Case("low-rank", low_rank_unet, conditional_inputs),
    Case("transposed-twice", Decoder, floats(2, 3, 3)),
]


@pytest.mark.parametrize("case", [*DIFFUSERS, *LAYERS], ids=lambda case: case.name)
def test_models_of_others(case: Case) -> None:
    model, inputs = case.build(rows=6)
    with fallbacks() as slow:
        check(model, inputs, augmult=2, forms=["auto", "gram", "materialise"] if case in DIFFUSERS else FORMS)
    assert not slow


# Ways of running a model


@pytest.mark.parametrize("build", [unet, conditional_unet], ids=["unet", "conditional"])
def test_activation_checkpointing_of_diffusers(build) -> None:
    torch.manual_seed(0)
    model, inputs = build(), (unet_inputs if build is unet else conditional_inputs)(6)
    model.enable_gradient_checkpointing()
    with fallbacks() as slow:
        check(model, inputs, augmult=2, forms=["auto", "gram"])
    assert not slow


def test_checkpointed_attention() -> None:
    """What a checkpoint runs again is composed again."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    with fallbacks() as slow:
        check(Layers(), (torch.randn(6, 3, 4),), augmult=2)
    assert not slow


def loss_of_a_dict(model, rows):
    out = model(rows[0], rows[1], encoder_hidden_states=rows[2], return_dict=True)
    return out["sample"].sin().flatten(1).mean(1)


def loss_of_a_tuple(model, rows):
    return model(*rows, return_dict=False)[0].sin().flatten(1).mean(1)


@pytest.mark.parametrize("loss", [loss_of_a_dict, loss_of_a_tuple])
def test_outputs_of_other_types(loss) -> None:
    torch.manual_seed(0)
    check(conditional_unet(), conditional_inputs(6), augmult=2, forms=["auto"], losses=loss)


def in_bfloat16(model, rows):
    with torch.autocast("cpu", torch.bfloat16, enabled=rows[0].dtype != torch.float64):
        return losses(model, rows)


AUTOCAST = {
    "unet": (unet, unet_inputs),
    "conditional": (conditional_unet, conditional_inputs),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), floats(5, 8)),
    "edm": (RawBlock, lambda n: (torch.randn(n, 2, 6, 6), torch.randn(n, 6))),
    "nin": (NetworkInNetwork, floats(4, 3, 3)),
    "lstm": (lambda: nn.LSTMCell(4, 3), floats(4)),
}


@pytest.mark.parametrize("form", ["auto", "gram", "direct", "materialise"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name, form) -> None:
    build, inputs = AUTOCAST[name]
    torch.manual_seed(0)
    model, rows = build(), inputs(6)
    settings = {"augmult": 2, "max_grad_norm": 0.1}

    def loss(m, r):
        return in_bfloat16((lambda *x: m(*x)[1]) if name == "lstm" else m, r)

    exact = per_example(model, loss, rows, **settings)
    plain = per_example(model, loss, rows, **settings, dtype=torch.float32)
    with fallbacks() as slow:
        got = clip(model, rows, **settings, form=form, losses=loss)
    assert not slow
    assert_as_good_as_torch(got, plain, exact, dtype=torch.bfloat16)


def test_adapters_of_peft() -> None:
    """Low-rank adapters, as diffusers adds them; everything else is frozen."""
    from peft import LoraConfig

    torch.manual_seed(0)
    model = conditional_unet().requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    with fallbacks() as slow:
        check(model, conditional_inputs(6), augmult=2, forms=["auto", "gram", "materialise"])
    assert not slow
