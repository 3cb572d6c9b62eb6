"""Checkpoints of OpenAI's guided-diffusion (ADM: Dhariwal and Nichol, arXiv 2105.05233) as networks of diffusers.

Its ``UNetModel`` and diffusers' ``UNet2DModel`` compute the same where the latter can be told to: residual blocks,
attention, skip connections and resampling stand in the same places under other names. Weights of attention are one
1-d convolution ``qkv`` there, three linear maps here.

A state dict does not say everything: how attention splits ``qkv`` into heads has to be known, and is in the flags of
the script that trained the model. What a UNet2DModel cannot be told is refused:

- ``num_heads`` with attention at several widths, or another ``num_heads_upsample``: one size of head serves all;
- ``conv_resample=False`` without ``resblock_updown``: resolutions change by a convolution or a residual block;
- a ``channel_mult`` that does not begin with 1: a timestep becomes as many numbers as the first width has channels;
- classifiers (half of a UNet).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpfast.clipping.problems import listed
from dpfast.diffusion.models import UNetSpec, unet_config
from dpfast.errors import ConfigError, FileError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_ENDS = {  # modules of diffusers, and their names in guided-diffusion
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LAYERS = {  # the same inside a residual block, or one of attention
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_PARTS = ("to_q", "to_k", "to_v")  # of qkv, in this order
_GROUPS = 32  # of every group norm of guided-diffusion


def load_guided(
    path: str | Path,
    *,
    image_size: int,
    use_new_attention_order: bool,
    num_head_channels: int | None = None,
    num_heads: int | None = None,
    keep_variance: bool = False,
) -> "UNet2DModel":
    """``guided_unet`` of a file: ``.safetensors``, or what ``torch.save`` wrote, of which only tensors are read.

    Raises ``FileError`` where it cannot be read or holds no state dict, ``ConfigError`` as ``guided_unet``.
    """
    return guided_unet(
        _read(Path(path)),
        image_size=image_size,
        use_new_attention_order=use_new_attention_order,
        num_head_channels=num_head_channels,
        num_heads=num_heads,
        keep_variance=keep_variance,
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the two find in a file
        raise FileError(f"{path} cannot be read as a state dict (tensors only, no other objects): {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"{path} holds a {type(state).__name__}; expected a state dict: tensors by name")
    return state


def guided_unet(
    state: Mapping[str, Tensor],
    *,
    image_size: int,
    use_new_attention_order: bool,
    num_head_channels: int | None = None,
    num_heads: int | None = None,
    keep_variance: bool = False,
) -> "UNet2DModel":
    """The UNet2DModel that computes what guided-diffusion's ``UNetModel`` does with these weights, in eval mode.

    state: its state dict, by name; widths, blocks, attention, classes and the rest are told from it. Each entry is used
        once, and becomes float32.
    image_size, use_new_attention_order, num_head_channels or num_heads: the flags the model was trained with.
    keep_variance: whether the second half of the outputs of a model trained with ``learn_sigma`` stays. Neither
        ``DiffusionObjective`` nor the samplers know what to do with it.

    Such models predict noise (``prediction_type="epsilon"``) on the "linear" or "squaredcos_cap_v2" schedule. They have
    no null class: ``relabel`` them for your labels.

    Raises ``ConfigError``, with all problems at once, where a UNet2DModel cannot be that network.
    """
    from diffusers import UNet2DModel

    found = _Architecture.of(state)
    config, problems = _config(found, image_size, num_head_channels, num_heads)
    if not config:
        raise _refusal(problems)
    with torch.device("meta"):
        model = UNet2DModel(**config)
    weights, unfit = _weights(model, found, state, use_new_attention_order=use_new_attention_order)
    if problems or unfit:
        raise _refusal(problems + unfit)
    model.load_state_dict(weights, assign=True)
    if not keep_variance and found.outputs == 2 * found.channels:
        _drop_variance(model, found.channels)
    loaded: UNet2DModel = model.eval()
    return loaded


def _refusal(problems: Sequence[str]) -> ConfigError:
    return ConfigError(
        "no UNet2DModel is this guided-diffusion checkpoint:\n" + "\n".join(f"  - {p}" for p in problems)
    )


@dataclass(frozen=True)
class _Architecture:
    """What a state dict tells of its UNetModel. attention: levels that have it, 0 the finest."""

    channels: int
    outputs: int
    classes: int | None
    embedded: int  # numbers that a timestep becomes: guided-diffusion's model_channels
    widths: tuple[int, ...]
    layers: int  # residual blocks of a level on the way down; one more on the way up
    attention: tuple[int, ...]
    scale_shift: bool
    resblock_updown: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "_Architecture":
        """Raises ``ConfigError`` where the names are of no ``UNetModel``, or its levels cannot be told apart."""
        inputs, outputs = (_blocks(state, side) for side in ("input_blocks", "output_blocks"))
        problems = _shape_problems(state, inputs, outputs)
        if problems:
            raise _refusal(problems)
        resampling = [n for n in range(outputs) if _upsampler(state, n)]
        levels = len(resampling) + 1
        first = [level * outputs // levels for level in range(levels)]  # blocks of the way up, the coarsest first
        if outputs % levels or resampling != [n - 1 for n in first[1:]]:
            raise _refusal([f"its levels have different numbers of blocks: {outputs} blocks, ending at {resampling}"])
        widths = [state[f"output_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in first]
        embedding = state["input_blocks.1.0.emb_layers.1.weight"]
        labels = state.get("label_emb.weight")
        return cls(
            channels=state["input_blocks.0.0.weight"].shape[1],
            outputs=state["out.2.weight"].shape[0],
            classes=None if labels is None else labels.shape[0],
            embedded=state["time_embed.0.weight"].shape[1],
            widths=tuple(reversed(widths)),
            layers=outputs // levels - 1,
            attention=tuple(levels - 1 - i for i, n in enumerate(first) if f"output_blocks.{n}.1.qkv.weight" in state),
            scale_shift=embedding.shape[0] == 2 * state["input_blocks.1.0.out_layers.3.weight"].shape[0],
            resblock_updown=any(
                f"output_blocks.{n}.{_upsampler(state, n)}.in_layers.2.weight" in state for n in resampling
            ),
        )


def _blocks(state: Mapping[str, Tensor], side: str) -> int:
    """One more than the highest number of a block."""
    found = (re.match(rf"{side}\.(\d+)\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape_problems(state: Mapping[str, Tensor], inputs: int, outputs: int) -> list[str]:
    """Why nothing more can be told."""
    needed = ["input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight", "input_blocks.1.0.out_layers.3.weight"]
    needed += [f"output_blocks.{n}.0.out_layers.3.weight" for n in range(max(1, outputs))]
    needed += ["time_embed.0.weight", "out.2.weight"]
    missing = [name for name in needed if name not in state]
    problems = [f"not the state dict of a UNetModel: it lacks {listed(missing)}"] if missing else []
    named = {name.rpartition(".")[0] for name in state}
    empty = [n for n in range(inputs) if not any(name.startswith(f"input_blocks.{n}.") for name in named)]
    if empty:
        blocks = listed(f"input_blocks.{n}" for n in empty)
        problems.append(f"{blocks} without weights (conv_resample=False?): resolutions are changed by what has weights")
    return problems


def _upsampler(state: Mapping[str, Tensor], block: int) -> int:
    """Which part of a block of the way up doubles the resolution; 0 for none."""
    layers = (
        f"output_blocks.{block}.{part}.{name}" for part in (1, 2) for name in ("conv.weight", "in_layers.2.weight")
    )
    return next((int(name.split(".")[2]) for name in layers if name in state), 0)


def _config(
    found: _Architecture, image_size: int, num_head_channels: int | None, num_heads: int | None
) -> tuple[dict[str, Any], list[str]]:
    head, problems = _head_channels(found, num_head_channels, num_heads)
    if found.embedded != found.widths[0]:
        problems.append(
            f"a timestep becomes {found.embedded} numbers, the first width is {found.widths[0]} (channel_mult begins"
            f" with {found.widths[0] / found.embedded:g}): expected the same"
        )
    try:
        spec = UNetSpec(
            image_size=image_size,
            channels=found.channels,
            widths=found.widths,
            layers_per_block=found.layers,
            norm_groups=_GROUPS,
            attention=found.attention,
            mid_attention=True,
            attention_head_dim=head,
            scale_shift=found.scale_shift,
            resblock_updown=found.resblock_updown,
        )
    except ConfigError as error:
        return {}, [*problems, str(error)]
    return {**unet_config(spec), "out_channels": found.outputs, "num_class_embeds": found.classes}, problems


def _head_channels(found: _Architecture, num_head_channels: int | None, num_heads: int | None) -> tuple[int, list[str]]:
    """The one ``attention_head_dim``, or 1 and what is wrong."""
    if (num_head_channels is None) == (num_heads is None):
        return 1, [f"{num_head_channels=} and {num_heads=}: expected one of them, as the model was trained with"]
    if num_head_channels is not None:
        return num_head_channels, []
    assert num_heads is not None
    attended = {found.widths[level] for level in (*found.attention, -1)}
    if len(attended) == 1 and num_heads > 0 and max(attended) % num_heads == 0:
        return max(attended) // num_heads, []
    return 1, [f"{num_heads=} at widths {sorted(attended)}: expected heads of one size, all that diffusers can be told"]


def _weights(
    model: "UNet2DModel", found: _Architecture, state: Mapping[str, Tensor], *, use_new_attention_order: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """What ``model`` is to hold, float32, and what does not fit."""
    names = dict(_modules(len(found.widths), found.layers, found.attention))
    head = model.config["attention_head_dim"]
    weights, missing, wrong, used = {}, [], [], set[str]()
    for name, wanted in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        source = f"{names[module]}.{leaf}"
        used.add(source)
        value, shape = state.get(source), wanted.shape
        if value is None:
            missing.append(source)
            continue
        part = module.rpartition(".")[2]
        if part in _PARTS and value.shape[0] == 3 * shape[0]:
            value = _part(value, _PARTS.index(part), shape[0] // head, use_new_attention_order)
        if not _fits(value.shape, shape):
            wrong.append(f"{source} {list(state[source].shape)} for {name} {list(shape)}")
            continue
        weights[name] = value.reshape(shape).to(torch.float32, copy=True)
    told = {
        "missing": dict.fromkeys(missing),
        "of another shape": wrong,
        "of no use": [n for n in state if n not in used],
    }
    return weights, [f"{what}: {listed(those, most=20)}" for what, those in told.items() if those]


def _modules(levels: int, layers: int, attention: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Names of modules in diffusers and in guided-diffusion, of all kinds that there can be in each place."""
    yield from _ENDS.items()
    for level in range(levels):
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        upsampler = f"output_blocks.{(level + 1) * (layers + 1) - 1}.{1 + (levels - 1 - level in attention)}"
        yield f"up_blocks.{level}.upsamplers.0.conv", f"{upsampler}.conv"
    for ours, theirs in _places(levels, layers, attention):
        for layer, its in _LAYERS.items():
            yield f"{ours}.{layer}", f"{theirs}.{its}"


def _places(levels: int, layers: int, attention: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Of residual blocks and attention."""
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    blocks = layers + 1  # of a level: on the way down the last one halves the resolution
    for level in range(levels):
        for i in range(layers):
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{1 + level * blocks + i}.0"
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{1 + level * blocks + i}.1"
        yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{(level + 1) * blocks}.0"
        for i in range(blocks):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{level * blocks + i}.0"
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{level * blocks + i}.1"
        upsampler = 1 + (levels - 1 - level in attention)
        yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{(level + 1) * blocks - 1}.{upsampler}"


def _part(qkv: Tensor, part: int, heads: int, new_order: bool) -> Tensor:
    """Queries, keys or values ``[C, ...]`` of ``qkv [3 C, ...]``.

    New order (``QKVAttention``): all queries, all keys, all values. Old (``QKVAttentionLegacy``): each head's queries,
    keys and values, one head after the other.
    """
    if new_order:
        return qkv.chunk(3)[part]
    return qkv.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """A linear map may come as a convolution with one tap."""
    return shape[: len(wanted)] == wanted and math.prod(shape[len(wanted) :]) == 1


def _drop_variance(model: Any, channels: int) -> None:
    """Of a model trained with ``learn_sigma``, whose outputs are the prediction, then its variance."""
    conv = model.conv_out
    with torch.no_grad():
        conv.weight, conv.bias = (torch.nn.Parameter(p[:channels].clone()) for p in (conv.weight, conv.bias))
    conv.out_channels = channels
    model.register_to_config(out_channels=channels)
