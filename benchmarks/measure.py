"""Time in interleaved rounds, memory by the allocator's own events, and a process's resident size."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


def interleaved(steps: Mapping[str, Step], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each round: one after the other, so that drifts of the machine meet all alike.

    Every second round runs in reverse order.
    """
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        names = list(steps) if round_ % 2 == 0 else list(reversed(steps))
        for name in names:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds[name], seconds[base], strict=True))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Ceiling:
    """What this machine reaches: FLOP/s of a large matrix product, bytes/s of a large copy or triad."""

    flops: float
    bytes: float

    def floor(self, flops: float, moved: int) -> float:
        """Seconds that nothing with this work can be faster than, unless its data are in a cache already."""
        return max(flops / self.flops, moved / self.bytes)

    def is_computing(self, flops: float, moved: int) -> bool:
        """Whether products are the limit, not memory."""
        return flops / self.flops > moved / self.bytes


def ceiling(dtype: torch.dtype, rounds: int = 5) -> Ceiling:
    """Measured now: on a shared machine it holds for what is measured next to it. The best of ``rounds``."""
    order, numbers = 1024, 1 << 24  # 64 MB a vector: more than a share of a last-level cache
    x = torch.randn(order, order).to(_fastest_product(dtype))
    vectors = [torch.ones(numbers) for _ in range(3)]
    seconds = interleaved(
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


def peak_storages(step: Step) -> int:
    """Bytes: the most that tensors allocated during ``step`` held at a time, less what it released of earlier ones."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
