"""The clock and the table: an op, the fastest way of torch and the ordinary gradient in the same rounds."""

import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import results
from benchmarks.kernels.case import Case, Passed
from benchmarks.measure import ceiling
from dpfast import measure

OURS = "dpfast"
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
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
    roof = roof.or_better(ceiling(getattr(torch, case.dtype)))  # a neighbour may have come in between
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


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest result of each op, shape and dtype, in the order of first results."""
    return list({(row["op"], row["shape"], row["dtype"]): row for row in rows}.values())


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Every op at every shape."""
    lines = [
        "| op | shape | dtype | speed | of the ceiling | time / ordinary gradient | time / torch | torch's way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in newest(rows):
        ordinary = f"{row['time']['ordinary']:.2f}" if "ordinary" in row["time"] else ""
        cells = [
            f"`{row['op']}`",
            row["shape"],
            DTYPES[row["dtype"]],
            f"{row['rate'] / 1e9:.1f} G{row['unit']}",
            f"{100 * row['rate'] / row['ceiling']:.0f}%",
            ordinary,
            f"{row['time'][row['way']]:.2f}",
            row["way"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Every op over its shapes: medians, and the range of its time beside torch's."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in newest(rows):
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    lines = [
        "| op | dtype | shapes | microseconds | of the ceiling | time / ordinary gradient | time / torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, dtype), found in groups.items():
        to_torch = sorted(row["time"][row["way"]] for row in found)
        ordinary = [row["time"]["ordinary"] for row in found if "ordinary" in row["time"]]
        microseconds = sorted(1e6 * row["seconds"][OURS] for row in found)
        cells = [
            f"`{op}`",
            DTYPES[dtype],
            str(len(found)),
            f"{microseconds[0]:,.0f} to {microseconds[-1]:,.0f}",
            f"{100 * statistics.median(row['rate'] / row['ceiling'] for row in found):.0f}%",
            f"{statistics.median(ordinary):.2f}" if ordinary else "",
            f"{statistics.median(to_torch):.2f} ({to_torch[0]:.2f} to {to_torch[-1]:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_tables() -> list[str]:
    """From the committed results into ``benchmarks/README.md``."""
    rows, written = results.rows("kernels"), []
    for name, make in {"ops": summary, "kernels": table}.items():
        written.append(make(rows))
        results.write_between_markers(results.ROOT / "benchmarks/README.md", name, written[-1])
    return written
