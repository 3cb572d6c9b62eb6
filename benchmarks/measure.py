"""What a machine can do at its best: products and bytes per second. A GPU is timed by its own clock."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from dpfast.measure import Step, interleaved

FLUSHED = 1 << 30  # bytes: written in 0.3 ms, several times what the host needs to call an op, and many times the cache


@dataclass(frozen=True)
class Ceiling:
    """What this machine reaches: FLOP/s of a large matrix product, bytes/s of a large copy or triad."""

    flops: float
    bytes: float

    def or_better(self, other: Self) -> Self:
        """Of both, what the machine showed that it can do."""
        return type(self)(max(self.flops, other.flops), max(self.bytes, other.bytes))

    def is_computing(self, flops: float, moved: int) -> bool:
        """Whether products are the limit, not memory."""
        return flops / self.flops > moved / self.bytes


def ceiling(dtype: torch.dtype, rounds: int = 5) -> Ceiling:
    """Measured now: on a shared machine it holds for what is measured next to it. The best of ``rounds``."""
    on_gpu = torch.get_default_device().type == "cuda"
    # 64 MB a vector: more than a share of a last-level cache.
    order, numbers = (8192, 1 << 28) if on_gpu else (1024, 1 << 24)
    x = torch.randn(order, order).to(dtype if on_gpu else _fastest_product(dtype))
    vectors = [torch.ones(numbers) for _ in range(3)]
    seconds = (by_events if on_gpu else interleaved)(
        {
            "product": lambda: x @ x,
            "copy": lambda: vectors[0].copy_(vectors[1]),
            "triad": lambda: torch.add(vectors[1], vectors[2], alpha=2.0, out=vectors[0]),
        },
        rounds=rounds,
        warmup=1,
    )
    best = {name: min(times) for name, times in seconds.items()}
    vector = vectors[0].nbytes
    return Ceiling(
        flops=2 * order**3 / best["product"], bytes=max(2 * vector / best["copy"], 3 * vector / best["triad"])
    )


@functools.cache
def _fastest_product(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where the processor has no products of ``dtype`` and converting is faster."""
    matrices = {d: torch.ones(512, 512, dtype=d) for d in {dtype, torch.float32}}
    seconds = interleaved({str(d): lambda x=x: x @ x for d, x in matrices.items()}, rounds=3, warmup=1)
    return min(matrices, key=lambda d: min(seconds[str(d)]))


def by_events(steps: Mapping[str, Step], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """As ``interleaved``, by the events of a GPU, whose caches hold nothing of a step when it begins.

    Emptying them takes longer than Python needs to call a step: what is measured is the GPU alone.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    other = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        for name in list(steps) if round_ % 2 == 0 else list(steps)[::-1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            begin.record()
            steps[name]()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds
