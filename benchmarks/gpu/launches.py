"""Every launch of a weight gradient's kernels in turn: whether the one that is chosen is the fastest."""

import importlib
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.jobs import Job, Missing, Options, Row
from benchmarks.gpu.kernels import available, cases, timed
from benchmarks.gpu.machine import device
from benchmarks.kernels.case import Case
from dpfast import measure
from dpfast.kernels.conv import launches as conv_launches

OPS = ("conv.sq_norms", "conv.clipped_sum", "linear.sq_norms")
LAYERS = ("192→192 3x3 @32", "384→384 3x3 @8", "384→384 3x3 @4", "768→384 1x1 @16", "384→384 @256 tokens", "768→384")
BY_POINTERS = ("192→192 3x3 stride 2 @32", "3→192 3x3 @32")  # sixteen launches to compile for each
BATCHES = ("B=128 K=1", "B=8 K=16")
ROUNDS = 7
SAME = 1e-3  # relative: what a launch gives, to what the chosen one gives


def jobs(options: Options) -> Iterator[Job]:
    found = [case for case in cases(dry=options.dry) if case.op in OPS]
    if options.dry:
        found = found[:1]
    else:
        found = [case for case in found if is_chosen(case)]
        found.sort(key=lambda case: case.shape.rsplit(", ", 1)[0] in BY_POINTERS)
    for case in found:
        name = f"{case.op}, {case.shape}, {case.dtype}"
        yield Job(name, partial(tried, case, rounds=2 if options.dry else ROUNDS), 30)


def is_chosen(case: Case) -> bool:
    layer, batch = case.shape.rsplit(", ", 1)
    return layer in (*LAYERS, *BY_POINTERS) and batch in BATCHES and case.dtype == "bfloat16"


def tried(case: Case, *, rounds: int) -> Row:
    if available() is None:
        raise Missing("Triton is not there")
    with torch.device(device()):
        arguments = case.arguments()
    step = partial(case.ours, *arguments)
    launches, chosen, expected = watched(step)
    seconds: dict[str, float | str] = {}
    for launch in launches:
        with these_launches(lambda launch=launch, **_: (launch,)):
            try:
                error = ((step().double() - expected).norm() / expected.norm()).item()
                assert error <= SAME, f"another result, by {error:.1e}"
                seconds[str(launch)] = statistics.median(timed({"": step}, rounds)[""])
            except Exception as failure:  # a launch that cannot run is a result, too
                seconds[str(launch)] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:100]}"
    measure.synchronize()  # what has broken the GPU breaks the row
    times = {name: found for name, found in seconds.items() if isinstance(found, float)}
    best = min(times, key=lambda name: times[name])
    ratio = times[str(chosen)] / times[best] if str(chosen) in times else None
    row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "launches": seconds, "ratio": ratio}
    said = f"{ratio:.2f} times the best of {len(times)}, {best}" if ratio else f"failed; the best is {best}"
    return {**row, "chosen": str(chosen), "best": best, "line": f"{chosen}: {said}"}


def watched(step: measure.Step) -> tuple[tuple[Any, ...], Any, torch.Tensor]:
    """The launches that a step has, the one that is chosen, and the result."""
    kernels: Any = importlib.import_module("dpfast.kernels.conv.triton")
    had, made, every, choose = [], [], conv_launches.launches, kernels.chosen

    def launches(**asked: bool) -> tuple[Any, ...]:
        had.append(every(**asked))
        return had[-1]

    def choosing(*args: Any, **asked: Any) -> Any:
        made.append(choose(*args, **asked))
        return made[-1]

    kernels.chosen = choosing
    try:
        with these_launches(launches):
            result = step().double()
    finally:
        kernels.chosen = choose
    return had[-1], made[-1].launch, result


@contextmanager
def these_launches(launches: Any) -> Iterator[None]:
    """In place of the module's own, forgetting what has been chosen before and inside."""
    before = conv_launches.launches
    conv_launches.launches = launches
    forget()
    try:
        yield
    finally:
        conv_launches.launches = before
        forget()


def forget() -> None:
    conv_launches.chosen.cache_clear()
    conv_launches.shares.cache_clear()
