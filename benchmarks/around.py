"""What a private step does beside the clipped sum: views of the images, noise, the optimizer; seconds, and shares.

python -m benchmarks.around             # measures, adds to results/around.jsonl and writes its table
python -m benchmarks.around --table     # only writes the table of benchmarks/README.md
"""

import argparse
import statistics
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contestants as c
from benchmarks import results
from benchmarks.cases import MODELS, Row
from benchmarks.step import task_of, warmed_up
from dpfast import Performance, measure
from dpfast.data.augment import Augment
from dpfast.data.keyed import RowKeys
from dpfast.diffusion import DiffusionObjective, NoiseSpec, build_scheduler
from dpfast.privacy.entropy import noised

ROWS = (Row("unet6m", 8, 1), Row("unet6m", 8, 4), Row("unet6m", 4, 16), Row("digits", 64, 8))
STEP = "clipped sum"


class Nothing(nn.Module):
    """In the place of a UNet: its input."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> SimpleNamespace:  # noqa: ARG002
        return SimpleNamespace(sample=x)


def parts(task: c.Task, model: str) -> dict[str, measure.Step]:
    """Each once a step; with microbatches, noise and optimizer once for all of them."""
    like = task.inputs[0]
    of = MODELS[model]
    images = torch.zeros(task.examples, of.channels, of.size, of.size, dtype=torch.uint8, device=like.device)
    labels = torch.zeros(task.examples, dtype=torch.int64, device=like.device)
    keys = RowKeys(seed=0, ids=torch.arange(task.examples, device=like.device), step=1, augmult=task.augmult)
    objective = DiffusionObjective(
        scheduler=build_scheduler(NoiseSpec()), num_classes=10, augment=Augment(flip=True, shift=2), label_drop=0.1
    )
    parameters = [nn.Parameter(p.detach().clone()) for p in task.parameters().values()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    adam = torch.optim.Adam(parameters, lr=1e-3)
    return {
        STEP: c.dpfast(Performance())(task),
        "views": lambda: objective(Nothing(), images, labels, keys),
        "noise": lambda: [noised(p.grad, 1.0, 8.0) for p in parameters if p.grad is not None],
        "Adam": adam.step,
    }


def measured(task: c.Task, model: str, rounds: int) -> dict[str, Any]:
    """Seconds of each part, and of the others relative to the clipped sum."""
    steps = parts(task, model)
    warmed_up(steps[STEP])
    seconds = measure.interleaved(steps, rounds=rounds)
    shares = {name: measure.ratio(seconds, name, STEP) for name in steps if name != STEP}
    line = ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {"seconds": medians, "shares": shares, "line": f"{1e3 * medians[STEP]:,.1f} ms; around it {line}"}


def table(rows: list[dict[str, Any]]) -> str:
    newest = {row["row"]: row for row in rows}
    names = ("views", "noise", "Adam")
    lines = [("step", "ms of the clipped sum", *names), ("---",) * (2 + len(names))]
    for name, row in newest.items():
        shares = (f"{100 * row['shares'][part]:.1f}%" for part in names)
        lines.append((name, f"{1e3 * row['seconds'][STEP]:,.0f}", *shares))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for row in () if options.table else ROWS:
        found = measured(task_of(row), row.model, options.rounds)
        print(f"{row.name}: {found['line']}", flush=True)
        results.append("around", {"row": row.name, **found})
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "around", table(results.rows("around")))


if __name__ == "__main__":
    main()
