"""Checkpoints of guided-diffusion in diffusers, against ADM's UNet written down once more."""

import math

import pytest
import torch
from torch import Tensor, nn

from dpfast.diffusion.guided import guided_unet, load_guided
from dpfast.diffusion.loading import load_unet, relabel
from dpfast.errors import ConfigError, FileError

GROUPS = 32


class Resample(nn.Module):
    """By a factor of 2: nearest neighbours up, means down; with a convolution of its own if ``conv``."""

    def __init__(self, channels: int, *, up: bool, conv: bool) -> None:
        super().__init__()
        self.up = up
        if conv:
            setattr(self, "conv" if up else "op", nn.Conv2d(channels, channels, 3, 1 if up else 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return self.conv(x) if hasattr(self, "conv") else x
        return self.op(x) if hasattr(self, "op") else x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, *, scale_shift: bool, resample=None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, *, heads: int, new_order: bool) -> None:
        super().__init__()
        self.norm, self.heads, self.new_order = nn.GroupNorm(GROUPS, channels), heads, new_order
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *space = x.shape
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = qkv.view(n, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            q, k, v = qkv.view(n, self.heads, 3, c // self.heads, -1).unbind(2)
        attention = (torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(c // self.heads)).softmax(-1)
        h = torch.einsum("nhts,nhcs->nhct", attention, v).reshape(n, c, -1)
        return x + self.proj_out(h).view(n, c, *space)


class Stage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Adm(nn.Module):
    """As in the appendix of Dhariwal and Nichol: names and places of layers are those of the released weights."""

    def __init__(
        self,
        *,
        base: int = 64,
        mult: tuple[float, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[int, ...] = (1,),
        classes: int | None = 5,
        channels: int = 3,
        outputs: int = 3,
        head_channels: int | None = 32,
        heads: int = 2,
        new_order: bool = True,
        scale_shift: bool = True,
        updown: bool = True,
        conv_resample: bool = True,
    ) -> None:
        super().__init__()
        self.base, embedding = base, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_emb = nn.Embedding(classes, embedding) if classes else None
        widths = [int(m * base) for m in mult]

        def res(inputs, outputs, resample=None):
            return ResBlock(inputs, outputs, embedding, scale_shift=scale_shift, resample=resample)

        def attend(width):
            return AttentionBlock(width, heads=width // head_channels if head_channels else heads, new_order=new_order)

        def change(width, *, up):
            if updown:
                return res(width, width, Resample(width, up=up, conv=False))
            return Resample(width, up=up, conv=conv_resample)

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(channels, widths[0], 3, padding=1))])
        width, skips = widths[0], [widths[0]]
        for level, wider in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(Stage(res(width, wider), *[attend(wider)] * (level in attention)))
                width = wider
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(change(width, up=False)))
                skips.append(width)
        self.middle_block = Stage(res(width, width), attend(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                layers = [res(width + skips.pop(), widths[level]), *[attend(widths[level])] * (level in attention)]
                width = widths[level]
                if level and i == blocks:
                    layers.append(change(width, up=True))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.base // 2
        angles = t[:, None].to(x.dtype) * torch.exp(-math.log(10000) * torch.arange(half).to(x.dtype) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        emb = emb if y is None else emb + self.label_emb(y)
        kept = []
        for block in self.input_blocks:
            x = block(x, emb)
            kept.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1), emb)
        return self.out(x)


def adm(**options) -> Adm:
    """With norms that are not those of their initialisation."""
    torch.manual_seed(0)
    model = Adm(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


FLAGS = {"image_size": 8, "use_new_attention_order": True, "num_head_channels": 32}


def converted(model: Adm, **flags):
    return guided_unet(model.state_dict(), **{**FLAGS, **flags})


def inputs(classes: int = 5, channels: int = 3):
    torch.manual_seed(1)
    return torch.randn(3, channels, 8, 8), torch.tensor([0, 17, 999]), torch.randint(0, classes, (3,))


@pytest.mark.parametrize("new_order", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("updown", [True, False])
def test_outputs_are_those_of_adm(new_order, scale_shift, updown) -> None:
    """Three levels, with attention in two of them, next to each other or not."""
    for attention in ((1, 2), (0, 2), ()):
        theirs = adm(
            mult=(1, 2, 2), blocks=2, attention=attention, new_order=new_order, scale_shift=scale_shift, updown=updown
        )
        ours = converted(theirs, use_new_attention_order=new_order)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        x, t, y = inputs()
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t, y).sample, theirs(x, t, y), rtol=1e-5, atol=1e-5)


def test_unconditional_and_heads_by_number() -> None:
    theirs = adm(classes=None, channels=1, outputs=1, head_channels=None, heads=4, attention=(1,))
    state = torch.get_rng_state()
    ours = converted(theirs, num_head_channels=None, num_heads=4)
    assert torch.equal(torch.get_rng_state(), state)
    x, t, _ = inputs(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t).sample, theirs(x, t), rtol=1e-5, atol=1e-5)


def test_the_order_of_heads_matters() -> None:
    theirs = adm(new_order=False)
    x, t, y = inputs()
    with torch.no_grad():
        assert (converted(theirs)(x, t, y).sample - theirs(x, t, y)).abs().max() > 1e-2


def test_learned_variance_is_left_out_or_kept() -> None:
    theirs = adm(outputs=6)
    x, t, y = inputs()
    with torch.no_grad():
        expected = theirs(x, t, y)
        torch.testing.assert_close(converted(theirs)(x, t, y).sample, expected[:, :3], rtol=1e-5, atol=1e-5)
        both = converted(theirs, keep_variance=True)(x, t, y).sample
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(tmp_path, suffix) -> None:
    """In half precision, as some are; relabelled and saved, plain diffusers opens the result."""
    from diffusers import UNet2DModel
    from safetensors.torch import save_file

    theirs = adm(outputs=6).half()
    path = tmp_path / f"adm{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), path)
    ours = relabel(load_guided(path, **FLAGS), 7, seed=0)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours.save_pretrained(tmp_path / "diffusers")
    again = UNet2DModel.from_pretrained(tmp_path / "diffusers").eval()
    x, t, y = inputs(classes=8)
    with torch.no_grad():
        expected = ours(x, t, y).sample
        torch.testing.assert_close(again(x, t, y).sample, expected, rtol=0, atol=0)
        torch.testing.assert_close(load_unet(tmp_path / "diffusers")(x, t, y).sample, expected, rtol=0, atol=0)


def test_files_that_hold_something_else(tmp_path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        load_guided(tmp_path / "none.pt", **FLAGS)
    torch.save({"model": {}}, tmp_path / "nested.pt")
    with pytest.raises(FileError, match="expected a state dict"):
        load_guided(tmp_path / "nested.pt", **FLAGS)
    torch.save(adm(), tmp_path / "pickled.pt")
    with pytest.raises(FileError, match="tensors only"):
        load_guided(tmp_path / "pickled.pt", **FLAGS)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"mult": (0.5, 1)}, {}, r"becomes 64 numbers, the first width is 32 \(channel_mult begins with 0\.5\)"),
        (
            {"attention": (0, 1), "head_channels": None},
            {"num_head_channels": None, "num_heads": 2},
            r"num_heads=2 at widths \[64, 128\]: expected heads of one size",
        ),
        ({}, {"num_heads": 2}, r"num_head_channels=32 and num_heads=2: expected one of them"),
        ({}, {"num_head_channels": 48}, r"attended widths \[128\] must be multiples of attention_head_dim=48"),
        ({}, {"num_head_channels": -1}, r"multiples of attention_head_dim=-1"),
        ({}, {"num_head_channels": None, "num_heads": 0}, r"num_heads=0 at widths \[128\]"),
        ({}, {"image_size": 7}, "image_size=7 cannot be halved 1 times"),
        ({"updown": False, "conv_resample": False}, {}, r"input_blocks\.2 without weights \(conv_resample=False\?\)"),
    ],
)
def test_what_diffusers_cannot_be_told_is_refused(options, flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(adm(**options), **flags)


def test_every_problem_of_a_state_is_said_at_once() -> None:
    state = adm().state_dict()
    state["extra.weight"] = torch.ones(1)
    state["middle_block.0.in_layers.2.weight"] = torch.ones(128, 128, 1, 1)
    del state["input_blocks.1.0.in_layers.0.bias"], state["middle_block.1.qkv.weight"]
    with pytest.raises(ConfigError) as caught:
        guided_unet(state, **{**FLAGS, "num_heads": 2})
    said = str(caught.value)
    for part in (
        "expected one of them",
        "missing: input_blocks.1.0.in_layers.0.bias, middle_block.1.qkv.weight",
        "of another shape: middle_block.0.in_layers.2.weight [128, 128, 1, 1] for mid_block.resnets.0.conv1.weight",
        "of no use: extra.weight",
    ):
        assert part in said


def test_what_is_no_unet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not the state dict of a UNetModel: it lacks input_blocks\.0\.0\.weight"):
        guided_unet(nn.Linear(2, 2).state_dict(), **FLAGS)
    classifier = {name: value for name, value in adm().state_dict().items() if not name.startswith("output_blocks")}
    with pytest.raises(ConfigError, match=r"lacks output_blocks\.0\.0\.out_layers\.3\.weight"):
        guided_unet(classifier, **FLAGS)
