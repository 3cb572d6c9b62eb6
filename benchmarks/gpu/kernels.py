"""Each op at the layers of an 83M UNet: gated, then timed beside cuDNN and cuBLAS doing the ordinary gradient."""

import functools
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.jobs import Job, Missing, Options, Row
from benchmarks.gpu.machine import device
from benchmarks.gpu.page import excess, is_beyond, times
from benchmarks.kernels import affine, clip, conv, linear, noise, norm
from benchmarks.kernels.case import Case, compare
from benchmarks.kernels.shapes import DRY_BATCHES, GPU_BATCHES, Batch
from benchmarks.measure import Ceiling, by_events, ceiling
from dpfast import measure
from dpfast.kernels import cost
from dpfast.kernels.dispatch import why_not_triton
from dpfast.kernels.precision import full_precision
from dpfast.kernels.rates import H200

# What decides a step first: (op, examples of a batch), and all others behind.
ORDER = [
    *((op, b) for b in (128, 8) for op in ("conv.sq_norms", "conv.clipped_sum", "norm.group_norm_backward")),
    *((op, b) for b in (128, 8) for op in ("conv.per_example_grads", "linear.sq_norms", "linear.clipped_sum")),
    *((op, b) for b in (1, 32) for op in ("conv.sq_norms", "conv.clipped_sum", "norm.group_norm_backward")),
    *((op, b) for b in (128, 32) for op in ("conv.gram_sq_norms", "linear.gram_sq_norms")),
    *((op, 8) for op in ("clip.sq_norms", "clip.clipped_sum", "linear.per_example_grads", "affine.bias_grads")),
    ("noise.noised", 8),
    *((op, b) for b in (1, 32) for op in ("conv.per_example_grads", "linear.sq_norms", "linear.clipped_sum")),
]
DRY = ("conv.sq_norms", "linear.clipped_sum", "norm.group_norm_backward", "clip.sq_norms", "noise.noised")
ROUNDS = 15
WRONG = 1e-2  # a relative error that is no rounding: not timed. What errs by more than the gate allows is said.


def jobs(options: Options) -> Iterator[Job]:
    yield Job("ceilings", ceilings, 5)
    for case in cases(dry=options.dry):
        run = partial(measured, case, rounds=2) if options.dry else partial(with_triton, case)
        yield Job(f"{case.op}, {case.shape}, {case.dtype}", run, 4)


def cases(*, dry: bool) -> list[Case]:
    """The most telling first; of the same, the layers in which most products are."""
    of = [replace(batch, backend=available()) for batch in (DRY_BATCHES if dry else GPU_BATCHES)]
    found = [(case, batch) for batch in of for case in cases_of(batch)]
    if dry:
        return [case for case, _ in found if case.op in DRY]
    rank = {key: number for number, key in enumerate(ORDER)}
    kept = [(rank[case.op, batch.examples], case) for case, batch in found if (case.op, batch.examples) in rank]
    kept.sort(key=lambda pair: (pair[0], pair[1].dtype != "bfloat16", -pair[1].count * pair[1].flops))
    return list({case.name: case for _, case in kept}.values())


def cases_of(batch: Batch) -> Iterable[Case]:
    with torch.device(device()):  # clip factors are made here
        return [case for op in (conv, norm, linear, clip, affine, noise) for case in op.cases([batch])]


def available() -> str | None:
    """Triton, or whatever there is to try the program with."""
    return "triton" if why_not_triton() is None else None


def with_triton(case: Case) -> Row:
    if reason := why_not_triton():
        raise Missing(reason)
    return measured(case, rounds=ROUNDS)


def measured(case: Case, *, rounds: int) -> Row:
    with torch.device(device()), full_precision():
        passed = compare(replace(case, ways=dict(list(case.ways.items())[:1])))
        arguments = case.arguments()
    assert passed.error <= WRONG, f"an error of {passed.error:.1e}, of torch in float32 {passed.error_of_torch:.1e}"
    steps = {"dpfast": partial(case.ours, *arguments)}
    if case.ordinary is not None:
        steps["ordinary"] = partial(case.ordinary, *arguments)
    seconds = timed(steps, rounds)
    roof, best = roofs(case.dtype), statistics.median(seconds["dpfast"])
    computing = roof.is_computing(case.flops, passed.bytes)
    row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "count": case.count,
        "error": passed.error,
        "error_of_torch": passed.error_of_torch,
        "excess": passed.excess,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "spread": {name: max(times) / min(times) for name, times in seconds.items()},
        "ratio": measure.ratio(seconds, "dpfast", "ordinary") if case.ordinary is not None else None,
        "calling": calling(steps["dpfast"], rounds),
        "rate": (case.flops if computing else passed.bytes) / best,
        "unit": "FLOP/s" if computing else "B/s",
        "ceiling": roof.flops if computing else roof.bytes,
        "predicted": predicted(case),
        "clock": "events, caches emptied before each call" if device() == "cuda" else "wall",
    }
    return {**row, "line": line(row)}


def timed(steps: dict[str, measure.Step], rounds: int) -> dict[str, list[float]]:
    if device() == "cuda":
        return by_events(steps, rounds=rounds)
    return measure.interleaved(steps, rounds=rounds, warmup=1)


def line(row: Row) -> str:
    ratio = f", {times(row['ratio'])} times the ordinary gradient" if row["ratio"] else ""
    beyond = f", {excess(row)}" if is_beyond(row) else ""
    speed = f"{row['rate'] / 1e12:.3g} T{row['unit']} ({100 * row['rate'] / row['ceiling']:.0f}%)"
    return f"{1e6 * row['seconds']['dpfast']:,.0f} us, {speed}{ratio}{beyond}"


def calling(step: measure.Step, calls: int) -> float:
    """Seconds that the processor takes to call it, whatever the GPU does meanwhile."""
    measure.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    seconds = (time.perf_counter() - begin) / calls
    measure.synchronize()
    return seconds


@functools.cache
def roofs(dtype: str) -> Ceiling:
    with torch.device(device()):
        return ceiling(getattr(torch, dtype))


def ceilings() -> Row:
    found = {dtype: roofs(dtype) for dtype in ("bfloat16", "float32")}
    flops = {dtype: of.flops for dtype, of in found.items()}
    row = {"flops": flops, "bytes": max(of.bytes for of in found.values())}
    products = ", ".join(f"{dtype} {of / 1e12:.3g} TFLOP/s" for dtype, of in flops.items())
    return {**row, "line": f"{products}, memory {row['bytes'] / 1e12:.3g} TB/s"}


def predicted(case: Case) -> float | None:
    """Seconds that ``dpfast.kernels.cost`` expects of products, on an H200."""
    if case.work is None:
        return None
    work = cost.Work(**case.work, brain=case.dtype == "bfloat16")
    found = {kernel.op: kernel.seconds for form in cost.FORMS for kernel in cost.kernels(work, form, H200)}
    return found.get(case.op.partition(".")[2])
