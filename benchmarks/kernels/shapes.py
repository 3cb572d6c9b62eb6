"""The layers of the benchmark models, and the batches in which they are measured."""

from dataclasses import dataclass

from dpfast.kernels.dispatch import Backend


@dataclass(frozen=True)
class Batch:
    """B ``examples`` of K = ``augmult`` rows each. backend: that ops are asked for; None lets them choose."""

    model: str
    examples: int
    augmult: int
    dtypes: tuple[str, ...] = ("float32",)
    channels_last: bool = False
    backend: Backend | None = None

    @property
    def rows(self) -> int:
        return self.examples * self.augmult

    @property
    def name(self) -> str:
        return f"B={self.examples} K={self.augmult}"


BATCHES = (
    Batch("unet6m", 8, 1),
    Batch("unet6m", 8, 4, ("float32", "bfloat16")),
    Batch("unet6m", 4, 16),
    Batch("digits", 64, 8, ("float32", "bfloat16")),
)
# Of a GPU (benchmarks.gpu): the same rows for every K. Autocast computes norms in float32.
GPU_BATCHES = tuple(
    Batch(model, examples, augmult, (dtype,), channels_last=True, backend="triton")
    for examples, augmult in ((128, 1), (8, 16), (32, 4), (1, 128))
    for model, dtype in (("unet83m", "bfloat16"), ("unet83m in float32", "float32"))
)
DRY_BATCHES = tuple(
    Batch("dry", 3, 2, (dtype,), channels_last=True, backend="triton") for dtype in ("float32", "bfloat16")
)


@dataclass(frozen=True)
class Conv:
    """A square kernel of ``size`` over an input of ``space`` times ``space``, padded by half the kernel.

    count: how many of these the model has.
    """

    inputs: int
    outputs: int
    size: int
    space: int
    stride: int = 1
    count: int = 1

    @property
    def padding(self) -> int:
        return self.size // 2

    @property
    def positions(self) -> int:
        return (self.space // self.stride) ** 2

    @property
    def name(self) -> str:
        step = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.inputs}→{self.outputs} {self.size}x{self.size}{step} @{self.space}"


CONVS = {
    "unet6m": (
        Conv(3, 64, 3, 32),
        Conv(64, 64, 3, 32),
        Conv(64, 64, 3, 32, stride=2),
        Conv(128, 128, 3, 16),
        Conv(256, 128, 1, 16),
        Conv(128, 128, 3, 8),
        Conv(256, 128, 3, 8),
    ),
    "digits": (Conv(1, 16, 3, 8), Conv(16, 16, 3, 8), Conv(16, 16, 3, 4), Conv(32, 16, 1, 8)),
    "unet83m": (
        Conv(192, 192, 3, 32, count=7),
        Conv(384, 384, 3, 16, count=7),
        Conv(384, 384, 3, 8, count=8),
        Conv(384, 384, 3, 4, count=11),
        Conv(384, 192, 3, 32, count=2),
        Conv(384, 384, 3, 32),
        Conv(768, 384, 3, 16, count=2),
        Conv(768, 384, 3, 8, count=3),
        Conv(768, 384, 3, 4, count=3),
        Conv(576, 192, 3, 32),
        Conv(576, 384, 3, 16),
        Conv(192, 384, 3, 16),
        Conv(192, 192, 3, 32, stride=2),
        Conv(384, 384, 3, 16, stride=2),
        Conv(384, 384, 3, 8, stride=2),
        Conv(3, 192, 3, 32),
        Conv(192, 3, 3, 32),
        Conv(576, 192, 1, 32),
        Conv(384, 192, 1, 32, count=2),
        Conv(768, 384, 1, 16, count=2),
        Conv(576, 384, 1, 16),
        Conv(192, 384, 1, 16),
        Conv(768, 384, 1, 8, count=3),
        Conv(768, 384, 1, 4, count=3),
    ),
    "unet83m in float32": (
        Conv(192, 192, 3, 32, count=7),
        Conv(384, 384, 3, 8, count=8),
        Conv(768, 384, 1, 16, count=2),
    ),
    "dry": (Conv(3, 20, 3, 4), Conv(20, 12, 1, 6, count=2)),
}


@dataclass(frozen=True)
class Linear:
    """Applied at each of ``positions`` tokens. count: as of ``Conv``."""

    inputs: int
    outputs: int
    positions: int = 1
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.inputs}→{self.outputs}" + (f" @{self.positions} tokens" if self.positions > 1 else "")


# Attention, the time embedding, its projection in a block.
LINEARS = {
    "unet6m": (Linear(128, 128, 64), Linear(256, 256), Linear(256, 128)),
    "digits": (Linear(64, 64),),
    "unet83m": (
        Linear(384, 384, 256, count=20),
        Linear(384, 384, 64, count=20),
        Linear(384, 384, 16, count=4),
        Linear(768, 384, count=17),
        Linear(768, 192, count=5),
        Linear(768, 768),
        Linear(192, 768),
    ),
    "unet83m in float32": (Linear(384, 384, 256, count=20),),
    "dry": (Linear(24, 20, 5),),
}


@dataclass(frozen=True)
class GroupNorm:
    """count: as of ``Conv``."""

    groups: int
    channels: int
    space: int
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.channels} channels @{self.space}"


GROUP_NORMS = {
    "unet6m": (GroupNorm(32, 64, 32), GroupNorm(32, 128, 16), GroupNorm(32, 128, 8)),
    "digits": (GroupNorm(8, 16, 8),),
    "unet83m in float32": (
        GroupNorm(32, 192, 32, count=8),
        GroupNorm(32, 384, 16, count=11),
        GroupNorm(32, 384, 8, count=12),
        GroupNorm(32, 384, 4, count=12),
        GroupNorm(32, 384, 32, count=2),
        GroupNorm(32, 576, 32),
        GroupNorm(32, 768, 16, count=2),
        GroupNorm(32, 576, 16),
        GroupNorm(32, 192, 16),
        GroupNorm(32, 768, 8, count=3),
        GroupNorm(32, 768, 4, count=3),
    ),
    "unet83m": (GroupNorm(32, 192, 32, count=8), GroupNorm(32, 384, 16, count=11)),
    "dry": (GroupNorm(4, 20, 5),),
}


@dataclass(frozen=True)
class Embedding:
    """A table looked up once a row: of classes."""

    table_rows: int
    features: int

    @property
    def name(self) -> str:
        return f"{self.table_rows}x{self.features} table"


EMBEDDINGS = {"unet6m": (Embedding(11, 256),), "digits": (Embedding(11, 64),)}
