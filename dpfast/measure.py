"""Time in interleaved rounds, and memory by the allocator's own events."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from dpfast.progress import Progress, silent

Step = Callable[[], object]


def interleaved(
    steps: Mapping[str, Step], *, rounds: int, warmup: int = 2, progress: Progress = silent
) -> dict[str, list[float]]:
    """Seconds of each step in each round: one after the other, so that drifts of the machine meet all alike.

    Every second round runs in reverse order.
    """
    for number in range(warmup):
        for step in steps.values():
            step()
        progress(number + 1, warmup + rounds, "warming up")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        names = list(steps) if round_ % 2 == 0 else list(steps)[::-1]
        for name in names:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
        progress(warmup + round_ + 1, warmup + rounds, "measuring")
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds[name], seconds[base], strict=True))


def synchronize() -> None:
    """Wait for what a GPU has been given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_storages(step: Step) -> int:
    """Bytes: the most that tensors allocated during ``step`` held at a time.

    On the CPU what it released of earlier ones does not count; on a GPU it is taken off.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler says when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    alive: dict[int, int] = {}  # sizes by place
    held = peak = 0
    for _, place, size in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        if size > 0:
            alive[place] = size
            held += size
            peak = max(peak, held)
        else:
            held -= alive.pop(place, 0)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """When, where and how much; negative: released."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
