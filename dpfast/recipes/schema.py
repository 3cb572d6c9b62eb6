"""What a recipe may say: one frozen dataclass per TOML table, each value with its type and range.

Types and ranges are checked when a recipe is loaded (``dpfast.recipes.convert``). ``None`` stands for "left
out of the file". A key that is added to a table has the default that does what was done before there was the key: runs
whose record has all of the table but that key go on (``dpfast.runs.stages``). For that reason a default never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from dpfast.performance import Performance


def above(low: float, *, default: Any = MISSING) -> Any:
    """A number greater than ``low``."""
    return _ranged(lambda v: v > low, f"a number above {low:g}", default)


def at_least(low: float, *, default: Any = MISSING) -> Any:
    """A number of ``low`` or more."""
    return _ranged(lambda v: v >= low, f"a number of at least {low:g}", default)


def between(low: float, high: float, *, default: Any = MISSING) -> Any:
    """A number above ``low`` and at most ``high``."""
    return _ranged(lambda v: low < v <= high, f"a number above {low:g} and at most {high:g}", default)


def within(low: float, high: float, *, default: Any = MISSING) -> Any:
    """A number from ``low`` (included) to ``high`` (excluded)."""
    return _ranged(lambda v: low <= v < high, f"a number from {low:g} to below {high:g}", default)


def _ranged(accepts: Callable[[float], bool], expected: str, default: Any) -> Any:
    return field(default=default, metadata={"accepts": accepts, "expected": expected})


@dataclass(frozen=True, kw_only=True)
class Data:
    """private: the data to protect, "digits" or the name of a store in ``folder`` (``dpfast data prepare``): its split
    "train"; on "test" accuracies are measured. public: what the model is pre-trained on, "fonts" (for digits) or a
    store. public_count: images of it, drawn by the seed, 0 for all. fold: of digits, 0 to 4 to choose settings on a
    fold of the private training part (the test images are then never read); left out for a real run.

    "zeros:cifar10" is no store: as many images of zeros as are published under that name, to plan with.
    """

    private: str
    public: str
    public_count: int = at_least(0)
    folder: str = "data"
    fold: int | None = within(0, 5, default=None)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The class-conditional UNet.

    widths: channels at each resolution, from the finest down. attention: at which of them (0 is the finest)
    there is self-attention. The rest is explained in ``dpfast.diffusion.UNetSpec``.
    """

    widths: tuple[int, ...]
    layers_per_block: int = above(0)
    norm_groups: int = above(0)
    attention: tuple[int, ...]
    mid_attention: bool
    attention_head_dim: int = above(0, default=8)
    scale_shift: bool = False
    resblock_updown: bool = False


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The noising process, and the share of rows whose label is dropped (for classifier-free guidance).

    process: "ddpm", to which num_train_timesteps, schedule and prediction belong, or "edm" (``dpfast.diffusion.edm``)
    with the preconditioning of ``sigma_data``, the standard deviation of pixels in -1..1, and ln(sigma) of mean
    ``p_mean`` and standard deviation ``p_std`` in both trainings. What belongs to the other one is not looked at.
    """

    process: Literal["ddpm", "edm"] = "ddpm"
    num_train_timesteps: int = above(0)
    schedule: Literal["linear", "squaredcos_cap_v2"]
    prediction: Literal["epsilon", "v_prediction"]
    label_drop: float = within(0, 1)
    sigma_data: float = between(0, 1, default=0.5)
    p_mean: float = within(-10, 10, default=-1.2)
    p_std: float = between(0, 10, default=1.2)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Ordinary training on public images: AdamW with a one-cycle learning rate.

    steps: 0 leaves it out. weights: a folder of a diffusers UNet2DModel to begin with, instead of random weights; one
    of another ``diffusion.process`` has to learn its noise levels anew.
    """

    steps: int = at_least(0)
    batch_size: int = above(0)
    learning_rate: float = between(0, 1e6)
    weight_decay: float = within(0, 1e6)
    ema_decay: float = within(0, 1)
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Private:
    """DP-SGD fine-tuning. timesteps: of "ddpm", [] for uniform, else [weight, low, high] triples.

    method: what is trained, all of the model, its attention (with the class embedding), or low-rank adapters of it of
    this ``rank`` (``dpfast.diffusion.finetune``). clipping: "flat", or "automatic" with ``stability``
    (``GhostClipper``). choices: settings among which ``dpfast sweep --noised`` may choose once, by how many private
    images each classifier reads right, with noise of standard deviation ``choice_noise`` images on each count; what
    that costs is set aside before the training's noise is calibrated. noise: as ``Plan`` has it. unsafe_debug: as
    ``DPTrainer`` has it.
    """

    target_epsilon: float = above(0)
    target_delta: float = between(0, 0.5)
    neighboring: Literal["add_remove", "replace"]
    sample_rate: float = between(0, 1)
    steps: int = above(0)
    augmult: int = above(0)
    max_grad_norm: float = above(0)
    learning_rate: float = between(0, 1e6)
    warmup_steps: int = at_least(0)
    ema_decay: float = within(0, 1)
    timesteps: tuple[tuple[float, float, float], ...]
    stratified: bool
    flip: bool
    shift: int = at_least(0)
    method: Literal["full", "attention", "lora"] = "full"
    rank: int = above(0, default=16)
    clipping: Literal["flat", "automatic"] = "flat"
    stability: float = at_least(1e-8, default=0.01)
    choices: int = _ranged(lambda v: v == 0 or v >= 2, "0, or a number of at least 2", 0)
    choice_noise: float = above(0, default=50.0)
    noise: Literal["gaussian", "grid"] = "gaussian"
    unsafe_debug: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Drawing synthetic images: post-processing, at no privacy cost. dtype: that the model computes in. compile: by
    ``torch.compile``. devices: that share the files of ``shard_size`` images, [] for that of [performance].

    sampler: "ddim" or "ddpm" of the process "ddpm", in ``steps`` calls of the model; "heun" of "edm", in
    ``2 steps - 1`` (18 steps are usual).
    """

    count: int = at_least(10)
    sampler: Literal["ddim", "ddpm", "heun"]
    steps: int = above(0)
    guidance: float = at_least(0)
    shard_size: int = above(0)
    batch_size: int = above(0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A plain DP-SGD classifier at the epsilon and delta of [private]: another way to spend the budget.

    pretrained: it starts from a classifier of the public images, as the generator starts from its own.
    """

    pretrained: bool
    sample_rate: float = between(0, 1)
    steps: int = above(0)
    augmult: int = above(0)
    max_grad_norm: float = above(0)
    learning_rate: float = between(0, 1e6)
    warmup_steps: int = at_least(0)
    ema_decay: float = within(0, 1)
    shift: int = at_least(0)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Classifiers trained on synthetic, public and real images, and scores of the synthetic ones.

    seeds: how many of each are averaged. extractor_steps: of the classifier of public images, whose features the scores
    use. extractor: a TorchScript file to use instead, such as Inception's. counts: numbers of synthetic images, besides
    all, that classifiers are trained on (figure 3 of the paper). network and what else follows:
    ``dpfast.evaluation.ClassifierSpec``; flip and crop (pixels): random at every step.
    """

    seeds: int = above(0)
    extractor_steps: int = above(0)
    steps: int = above(0)
    batch_size: int = above(0)
    learning_rate: float = between(0, 1e6)
    network: Literal["small-cnn", "wrn-40-4", "wrn-16-4", "wrn-16-1", "resnet-18"] = "small-cnn"
    norm: Literal["group", "batch"] = "group"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = within(0, 1e6, default=0.05)
    warp: float = at_least(0, default=0.12)
    pixel_noise: float = at_least(0, default=0.1)
    flip: bool = False
    crop: int = at_least(0, default=0)
    counts: tuple[int, ...] = ()
    extractor: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on. ``seed`` reaches initial weights, augmentations and samples, but never the
    privacy noise or the choice of batches, which come from the operating system.
    """

    name: str
    seed: int = within(0, 2**32)
    data: Data
    model: Model
    diffusion: Diffusion
    pretrain: Pretrain
    private: Private
    sample: Sample
    baseline: Baseline
    evaluate: Evaluate
    performance: Performance
