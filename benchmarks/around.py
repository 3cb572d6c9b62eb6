"""What a private step does beside the clipped sum: views of the images, noise, the optimizer; seconds, and shares.

python -m benchmarks.around             # measures, adds to results/around.jsonl and writes its table
python -m benchmarks.around --table     # only writes the table of benchmarks/README.md
"""

from typing import Any

import torch
from torch import nn

from benchmarks import contestants as c
from benchmarks import shares
from benchmarks.cases import MODELS, Row
from benchmarks.step import task_of
from dpfast import Performance
from dpfast.data.keyed import RowKeys
from dpfast.privacy.entropy import noised

ROWS = (Row("unet6m", 8, 1), Row("unet6m", 8, 4), Row("unet6m", 4, 16), Row("digits", 64, 8))


def parts(task: c.Task, model: str) -> shares.Steps:
    """Each once a step; with microbatches, noise and optimizer once for all of them."""
    like = task.inputs[0]
    of = MODELS[model]
    images = torch.zeros(task.examples, of.channels, of.size, of.size, dtype=torch.uint8, device=like.device)
    labels = torch.zeros(task.examples, dtype=torch.int64, device=like.device)
    keys = RowKeys(seed=0, ids=torch.arange(task.examples, device=like.device), step=1, augmult=task.augmult)
    views = shares.views()
    parameters = [nn.Parameter(p.detach().clone()) for p in task.parameters().values()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    adam = torch.optim.Adam(parameters, lr=1e-3)
    return {
        shares.STEP: c.dpfast(Performance())(task),
        "views": lambda: views(images, labels, keys),
        "noise": lambda: [noised(p.grad, 1.0, 8.0) for p in parameters if p.grad is not None],
        "Adam": adam.step,
    }


def measured(task: c.Task, model: str, rounds: int) -> dict[str, Any]:
    return shares.measured(parts(task, model), rounds)


def table(rows: list[dict[str, Any]]) -> str:
    return shares.table(rows, ("views", "noise", "Adam"))


if __name__ == "__main__":
    shares.main("around", __doc__, ROWS, lambda row, rounds: measured(task_of(row), row.model, rounds), table)
