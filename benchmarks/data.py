"""What the input of a private step costs: a batch out of a memory-mapped store, its K views; seconds, and shares.

python -m benchmarks.data               # measures, adds to results/data.jsonl and writes its table
python -m benchmarks.data --row "digits float32 B=1024 K=1" --rounds 3
python -m benchmarks.data --table       # only writes the table of benchmarks/README.md
"""

import functools
import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import contestants as c
from benchmarks import shares
from benchmarks.cases import MODELS, Row
from benchmarks.step import task_of
from dpfast import Performance, poisson_sample
from dpfast.data import ImageSet, RowKeys, StoreWriter, open_store
from dpfast.data.examples import Examples
from dpfast.physical import usual_size
from dpfast.seeding import seeded

COUNT, RATE = 50_000, 0.32768  # images, and of the sample: those of the recipe cifar10
PARTS = ("sample", "gather", "views", "gather and views")
CHUNK = 1000


def row_of(model: str, augmult: int) -> Row:
    """A full physical batch, as ``DPTrainer`` makes it."""
    of = MODELS[model]
    size = usual_size(Performance(), augmult, of.channels * of.size**2, RATE * COUNT, COUNT)
    return Row(model, size.examples, augmult)


ROWS = tuple(row_of(model, augmult) for model in ("unet6m", "digits") for augmult in (1, 16, 128))


@functools.cache
def store(count: int, channels: int, size: int) -> ImageSet:
    """Random pixels in ten classes, memory-mapped; what is mapped outlives the names of its files."""
    random, labels = np.random.default_rng(0), np.arange(CHUNK) % 10
    pixels = (random.integers(0, 256, (CHUNK, channels, size, size), np.uint8) for _ in range(0, count, CHUNK))
    with TemporaryDirectory() as folder:
        with StoreWriter(Path(folder) / "store", name="random", classes=tuple("0123456789")) as writer:
            writer.add("train", count, ((chunk, labels) for chunk in pixels))
            writer.finish(source=[])
        return open_store(Path(folder) / "store", "train")


def parts(row: Row) -> shares.Steps:
    """Each once for a physical batch, of other images every time; the sample once for all that a step has of them."""
    of = MODELS[row.model]
    examples, views = Examples(store(COUNT, of.channels, of.size)), shares.views()
    physical = poisson_sample(COUNT, RATE).split(row.examples)
    batches = itertools.cycle(ids for ids in physical if len(ids) == row.examples)

    def gathered(ids: Tensor) -> tuple[Tensor, ...]:
        with seeded(0):  # as DPTrainer keeps apart what a data set draws
            return examples.batch(ids, row.examples)

    def viewed(ids: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return views(*batch, RowKeys(seed=0, ids=ids, step=1, augmult=row.augmult))

    def both() -> Tensor:
        ids = next(batches)
        return viewed(ids, gathered(ids))

    first = next(batches)
    batch = gathered(first)
    return {
        shares.STEP: c.dpfast(c.ALONE if row.examples == 1 else Performance())(task_of(row)),
        "sample": lambda: poisson_sample(COUNT, RATE),
        "gather": lambda: gathered(next(batches)),
        "views": lambda: viewed(first, batch),
        "gather and views": both,
    }


def measured(row: Row, rounds: int) -> dict[str, Any]:
    return shares.measured(parts(row), rounds)


def table(rows: list[dict[str, Any]]) -> str:
    return shares.table(
        rows, PARTS, lambda row, name: f"{1e3 * row['seconds'][name]:.2f} ms, {shares.share(row, name)}"
    )


if __name__ == "__main__":
    shares.main("data", __doc__, ROWS, measured, table)
