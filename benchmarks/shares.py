"""What a private step does beside the clipped sum of its gradients, as seconds and as shares of that sum."""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from benchmarks import results
from benchmarks.cases import Row
from benchmarks.step import warmed_up
from dpfast import measure
from dpfast.data.augment import Augment
from dpfast.diffusion import DiffusionObjective, NoiseSpec, build_scheduler

STEP = "clipped sum"
Steps = dict[str, measure.Step]


class Nothing(nn.Module):
    """In the place of a UNet: its input."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> SimpleNamespace:  # noqa: ARG002
        return SimpleNamespace(sample=x)


def views() -> Callable[..., Tensor]:
    """``(images, labels, keys)``: crops, flips, timesteps and noised images of all rows, and what becomes of a loss."""
    objective = DiffusionObjective(
        scheduler=build_scheduler(NoiseSpec()), num_classes=10, augment=Augment(flip=True, shift=2), label_drop=0.1
    )
    return partial(objective, Nothing())


def measured(steps: Steps, rounds: int) -> dict[str, Any]:
    """Seconds of each step, and of all but ``STEP`` relative to it."""
    warmed_up(steps[STEP])
    seconds = measure.interleaved(steps, rounds=rounds)
    shares = {name: measure.ratio(seconds, name, STEP) for name in steps if name != STEP}
    line = ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {"seconds": medians, "shares": shares, "line": f"{1e3 * medians[STEP]:,.1f} ms; around it {line}"}


def share(row: dict[str, Any], name: str) -> str:
    return f"{100 * row['shares'][name]:.1f}%"


def table(
    rows: Iterable[dict[str, Any]], names: Sequence[str], cell: Callable[[dict[str, Any], str], str] = share
) -> str:
    """Newest result of each row."""
    newest = {row["row"]: row for row in rows}
    lines = [("step", "ms of the clipped sum", *names), ("---",) * (2 + len(names))]
    for name, row in newest.items():
        lines.append((name, f"{1e3 * row['seconds'][STEP]:,.0f}", *(cell(row, part) for part in names)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    name: str,
    what: str | None,
    rows: Sequence[Row],
    measured: Callable[[Row, int], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """The command ``benchmarks.<name>``: measures rows, keeps what comes out, and writes its table."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", choices=[row.name for row in rows], help="all by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for row in () if options.table else rows:
        if options.row is None or row.name in options.row:
            found = measured(row, options.rounds)
            print(f"{row.name}: {found['line']}", flush=True)
            results.append(name, {"row": row.name, **found})
    results.write_between_markers(results.ROOT / "benchmarks/README.md", name, table(results.rows(name)))
