"""The clock and the table: an op, the fastest way of torch and the ordinary gradient in the same rounds."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.kernels.case import Case, Passed
from benchmarks.measure import ceiling
from dpfast import measure

OURS = "dpfast"
SHORTEST = 1e-3  # seconds of a timed step: calls of microseconds are timed several at a time


def timed(case: Case, passed: Passed, rounds: int) -> dict[str, Any]:
    """A row of results. ``time``: median over rounds of the op's time relative to each other within a round."""
    arguments = case.arguments()
    way = min(case.ways, key=lambda name: _seconds(lambda: case.ways[name](*arguments)))
    # The first and the last follow themselves in every second round, with their data in a cache: not ours.
    functions = {way: case.ways[way], OURS: case.ours}
    if case.ordinary:
        functions["ordinary"] = case.ordinary
    calls = math.ceil(SHORTEST / _seconds(lambda: case.ours(*arguments)))
    steps = {name: lambda f=f: [f(*arguments) for _ in range(calls)] for name, f in functions.items()}
    roof = ceiling(getattr(torch, case.dtype))
    seconds = measure.interleaved(steps, rounds=rounds)
    best = min(seconds[OURS]) / calls
    computing = roof.is_computing(case.flops, passed.bytes)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "error": passed.error,
        "error_of_torch": passed.error_of_torch,
        "threads": torch.get_num_threads(),
        "way": way,
        "seconds": {name: min(times) / calls for name, times in seconds.items()},
        "time": {name: measure.ratio(seconds, OURS, name) for name in functions if name != OURS},
        "rate": (case.flops if computing else passed.bytes) / best,
        "unit": "FLOP/s" if computing else "B/s",
        "ceiling": roof.flops if computing else roof.bytes,
    }


def _seconds(step: measure.Step) -> float:
    """The faster of two calls, the second of which finds everything warm; of one if that is long."""
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
        if best > 1:
            break
    return best


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Newest result of each op, shape and dtype, in the order of first results."""
    newest = {(row["op"], row["shape"], row["dtype"]): row for row in rows}
    lines = [
        "| op | shape | dtype | speed | of the ceiling | time / ordinary gradient | time / torch | torch's way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in newest.values():
        ordinary = f"{row['time']['ordinary']:.2f}" if "ordinary" in row["time"] else ""
        cells = [
            f"`{row['op']}`",
            row["shape"],
            {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]],
            f"{row['rate'] / 1e9:.1f} G{row['unit']}",
            f"{100 * row['rate'] / row['ceiling']:.0f}%",
            ordinary,
            f"{row['time'][row['way']]:.2f}",
            row["way"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
