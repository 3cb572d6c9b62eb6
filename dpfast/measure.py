"""Time in interleaved rounds, and memory by the allocator's own events."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

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
        names = list(steps) if round_ % 2 == 0 else list(steps)[::-1]
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
    """Wait for what a GPU has been given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
