"""The layers of the benchmark models, and the batches in which they are measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """B ``examples`` of K = ``augmult`` rows each."""

    model: str
    examples: int
    augmult: int
    dtypes: tuple[str, ...] = ("float32",)

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


@dataclass(frozen=True)
class Conv:
    """A square kernel of ``size`` over an input of ``space`` times ``space``, padded by half the kernel."""

    inputs: int
    outputs: int
    size: int
    space: int
    stride: int = 1

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
}


@dataclass(frozen=True)
class Linear:
    """Applied at each of ``positions`` tokens."""

    inputs: int
    outputs: int
    positions: int = 1

    @property
    def name(self) -> str:
        return f"{self.inputs}→{self.outputs}" + (f" @{self.positions} tokens" if self.positions > 1 else "")


# Attention, the time embedding, its projection in a block.
LINEARS = {"unet6m": (Linear(128, 128, 64), Linear(256, 256), Linear(256, 128)), "digits": (Linear(64, 64),)}


@dataclass(frozen=True)
class GroupNorm:
    groups: int
    channels: int
    space: int

    @property
    def name(self) -> str:
        return f"{self.channels} channels @{self.space}"


GROUP_NORMS = {
    "unet6m": (GroupNorm(32, 64, 32), GroupNorm(32, 128, 16), GroupNorm(32, 128, 8)),
    "digits": (GroupNorm(8, 16, 8),),
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
