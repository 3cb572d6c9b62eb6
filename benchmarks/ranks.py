"""Weak scaling: two processes that train one model, against two that train apart at the same time.

    python -m benchmarks.ranks               # a few minutes on two idle cores; adds to ranks.jsonl
    python -m benchmarks.ranks --table       # only writes the table of benchmarks/README.md

Every process has one thread. In turns, step by step, both train apart (256 images each, ``Ranks.alone()``), then
together as replicas, then as shards of ``fully_shard`` (512 images). Samples have a fixed size, for a fair comparison;
all else is a private step of DPTrainer: probes, noise, ledger (in memory), averaged model. A rate is images per second
and process; the share is that of training together over the mean of the two apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results

EACH, PHYSICAL = 256, 32  # images of a process and step, and of a physical batch
WARM_UP, ROUNDS = 3, 7
LEAST = 0.9
KINDS = {"replicas": "replicas", "shards": "`fully_shard`"}


def trainer(images: int, *, shards: bool = False, **settings: Any) -> Any:
    """Of a UNet of 1.5M parameters at 16x16."""
    from benchmarks.cases import unet
    from dpfast import DPTrainer, Performance, Plan
    from dpfast.data import ImageSet
    from dpfast.diffusion import DiffusionObjective, NoiseSpec, build_scheduler

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4 * EACH, 3, 16, 16), dtype=torch.uint8, generator=generator)
    data = ImageSet(pixels, torch.arange(4 * EACH) % 10, tuple("abcdefghij"))
    plan = Plan(
        dataset_size=len(data),
        expected_batch_size=images,
        max_grad_norm=1.0,
        steps=1000,
        noise_multiplier=1.0,
        target_delta=1e-5,
    )
    return DPTrainer(
        cut(unet(32, 16)) if shards else unet(32, 16),
        data,
        plan,
        objective=DiffusionObjective(scheduler=build_scheduler(NoiseSpec()), num_classes=10),
        optimizer=torch.optim.Adam,
        performance=Performance(microbatch=PHYSICAL),
        ema_decay=0.99,
        **settings,
    )


def cut(model: nn.Module) -> nn.Module:
    """In shards, stage by stage."""
    from torch.distributed.fsdp import fully_shard

    for stage in (*model.down_blocks, model.mid_block, *model.up_blocks):  # type: ignore[union-attr,misc]
        fully_shard(stage)
    fully_shard(model)
    return model


def step_of(its: Any, images: int) -> Callable[[], float]:
    """Takes a step over so many images, and says how long it took."""
    from dpfast import DPOptimizer
    from dpfast import trainer as module

    optimizer = DPOptimizer(its.inner_optimizer, its.plan, its.clipper, ranks=its.ranks)
    if its.ranks.size > 1:
        its._meet()

    def fixed(size: int, _: float) -> Tensor:
        return torch.randperm(size)[:images].sort().values

    def step() -> float:
        module.poisson_sample = fixed
        begin = time.perf_counter()
        its._take(optimizer.steps_taken + 1, optimizer)
        return time.perf_counter() - begin

    return step


def work(out: Path) -> None:
    """Of each process."""
    import torch.distributed as dist

    from dpfast.ranks import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks.current()
    steps = {
        "apart": step_of(trainer(EACH, ranks=Ranks.alone()), EACH),
        "replicas": step_of(trainer(EACH * ranks.size), EACH * ranks.size),
        "shards": step_of(trainer(EACH * ranks.size, shards=True), EACH * ranks.size),
    }
    for number in range(WARM_UP + ROUNDS):
        seconds = {}
        for kind, step in steps.items():
            ranks.wait()
            seconds[kind] = step()
        told = ranks.tell(seconds)
        if ranks.leads and number >= WARM_UP:
            apart = statistics.mean(EACH / each["apart"] for each in told)
            row = {"round": number - WARM_UP, "ranks": ranks.size, "apart": apart}
            row |= {kind: EACH / max(each[kind] for each in told) for kind in KINDS}
            results.append("ranks", row, out)
    dist.destroy_process_group()


def run() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "benchmarks.ranks"]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *launch, "--worker", folder], check=True, cwd=results.ROOT, env=os.environ | settings
        )
        for row in results.rows("ranks", Path(folder)):
            results.append("ranks", row)


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of the last run."""
    if len(rows) < ROUNDS:
        raise ValueError(f"fewer than {ROUNDS} rounds: python -m benchmarks.ranks")
    return rows[-ROUNDS:]


def share(rows: list[dict[str, Any]], kind: str) -> float:
    """Of the rate apart, median over rounds."""
    return statistics.median(row[kind] / row["apart"] for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over rounds."""
    found = newest(rows)
    rate = partial(_median, found)
    lines = ["| two processes | images a second and process | share |", "|---|---|---|"]
    lines.append(f"| apart | {rate('apart'):.1f} | 100% |")
    lines += [f"| {name} | {rate(kind):.1f} | {100 * share(found, kind):.1f}% |" for kind, name in KINDS.items()]
    return "\n".join(lines)


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker)
        return
    if not chosen.table:
        run()
    rows = results.rows("ranks")
    text = table(rows)
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "ranks", text)
    print(text)
    if slow := [kind for kind in KINDS if share(newest(rows), kind) < LEAST]:
        sys.exit(f"less than {LEAST:.0%} of the rate apart: {', '.join(slow)}")


if __name__ == "__main__":
    main()
