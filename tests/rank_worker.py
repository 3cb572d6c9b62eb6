"""What test_ranks.py has every rank do: ``python rank_worker.py TASK FOLDER`` under torchrun, or alone."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import dpfast.engine.loader
import dpfast.optimizer
import dpfast.ranks.sums
import dpfast.trainer
from command_worker import threads
from dpfast import DPOptimizer, DPTrainer, GhostClipper, Performance, Plan, PrivacyEngine
from dpfast.callbacks import Callback
from dpfast.clipping.trees import tensors_in
from dpfast.engine import BatchMemoryManager
from dpfast.errors import DPFastError
from dpfast.pace import Allowance
from dpfast.ranks import Ranks, gathered, open_ledger, share
from dpfast.ranks.shards import full_state

EXAMPLES, K = 24, 2


class Points(torch.utils.data.Dataset):
    """Items of a pattern that differs by example; ``scale`` is that of example 5."""

    def __init__(self, scale: float = 1.0, count: int = EXAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 2, 5, 5, generator=generator)
        self.images[5 % count] *= scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], i % 3


def network(seed: int = 0) -> nn.Module:
    """Odd sizes, so that shards differ in length and some are empty."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.SiLU(), nn.Flatten(), nn.Linear(45, 7), nn.Linear(7, 3)
    )


def cut(model: nn.Module) -> nn.Module:
    """In shards, layer by layer, as fully_shard is used."""
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[4]):
        fully_shard(layer)
    return fully_shard(model)


def objective(model: Any, images: Tensor, labels: Tensor, keys: Any) -> Tensor:
    rows = images.repeat_interleave(keys.augmult, 0) + 0.1 * keys.normal(2, 5, 5, stream="noise")
    return nn.functional.cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")


def plan(**changes: Any) -> Plan:
    settings = {
        "dataset_size": EXAMPLES,
        "expected_batch_size": 12,
        "max_grad_norm": 0.5,
        "steps": 4,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
    }
    return Plan(**{**settings, **changes})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trainer(folder: Path | None = None, *, shards: bool = False, **changes: Any) -> DPTrainer:
    settings: dict[str, Any] = {"objective": objective, "optimizer": adam, "augmult": K, "state_dir": folder}
    settings |= {"performance": Performance(microbatch=4), "ema_decay": 0.5, "plan": plan(), "dataset": Points()}
    settings |= changes
    model = settings.pop("model", None) or network()
    return DPTrainer(cut(model) if shards else model, settings.pop("dataset"), settings.pop("plan"), **settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in full_state(model.state_dict()).items()}


# What is sent


class Sent(TorchDispatchMode):
    """Bytes that this rank gives to the ops of torch.distributed, whoever calls them, by op."""

    GIVEN: ClassVar = {  # the arguments with what is given, by op
        "_reduce_scatter_base_": 1,
        "_allgather_base_": 1,
        "allreduce_": 0,
        "broadcast_": 0,
        "allgather_": 1,
        "reduce_scatter_": 1,
        "barrier": 0,
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1].split(".")[0]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors_in(args[self.GIVEN[name]]))
        return func(*args, **(kwargs or {}))


# Tasks: what a rank returns is saved for the tests


SAMPLES = ([0, 3, 5, 7, 8, 13, 14, 15, 20], [2], [], list(range(EXAMPLES)))


def steps(folder: Path) -> dict[str, Any]:
    """Weights after each of four steps without noise over known samples, by kind."""
    found: dict[str, Any] = {}
    for kind in ("replicas", "shards"):
        samples = iter(SAMPLES)
        dpfast.trainer.poisson_sample = lambda *_, samples=samples: torch.tensor(next(samples), dtype=torch.int64)
        free = plan(noise_multiplier=None, target_epsilon=float("inf"))
        after: list[dict[str, Tensor]] = []
        # Of different weights on different ranks rank 0's are what is trained.
        seed = Ranks.current().rank if kind == "replicas" else 0
        t = trainer(folder / kind, shards=kind == "shards", plan=free, model=network(seed), optimizer=descent)
        take = t._take

        def watched(step: int, optimizer: DPOptimizer, t: DPTrainer = t, take: Any = take, after: Any = after) -> None:
            take(step, optimizer)
            after.append(weights(t.model))

        t._take = watched
        t.fit()
        with t.averaged() as model:
            averages = weights(model)
        found[kind] = {"after": after, "averages": averages, "again": weights(t.model)}
    return found


def descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


class Heard(Callback):
    def __init__(self) -> None:
        self.reports: list[Any] = []

    def on_step(self, report: Any) -> None:
        self.reports.append(report)


class Gathers(Callback):
    def on_begin(self, trainer: Any) -> None:
        next(iter(trainer.model.parameters())).full_tensor()


def logged(_: Path) -> dict[str, Any]:
    """Norms that callbacks hear, and what they are of; callbacks are given to rank 0 alone."""
    found = {}
    for kind in ("replicas", "shards"):
        heard = Heard()
        t = trainer(shards=kind == "shards", callbacks=[heard] if Ranks.current().leads else [])
        t.fit()
        with t.averaged() as model:
            averages = flat(model)
        found[kind] = {"weights": flat(t.model), "averages": averages, "steps": len(heard.reports)}
        if heard.reports:
            last = heard.reports[-1].diagnostics
            found[kind] |= {"norm": last.parameter_norm, "distance": last.ema_distance}
    return found


DRAWS = 300


def noise(_: Path) -> dict[str, Any]:
    """Noised means of empty sums, in units of what they should deviate by, ``[DRAWS, numbers]``."""
    found = {}
    for kind in ("replicas", "shards"):
        model = cut(network()) if kind == "shards" else network()
        many = plan(steps=DRAWS)
        optimizer = DPOptimizer(descent(model.parameters()), many, GhostClipper(model, max_grad_norm=0.5))
        before, drawn = flat(model), []
        for _ in range(DRAWS):
            with gathered(model):
                optimizer.step()
            now = flat(model)
            drawn.append((before - now).double() * many.expected_batch_size / (many.noise_multiplier * 0.5))
            before = now
        found[kind] = torch.stack(drawn)
    return found


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in weights(model).values()])


def traffic(_: Path) -> dict[str, Any]:
    """Bytes of a step, by kind, K and examples of a physical batch; the first step is not counted."""
    found: dict[str, Any] = {}
    dpfast.ranks.sums.BUCKET = 1 << 23
    for kind, augmult, microbatch in ((k, a, m) for k in ("replicas", "shards") for a in (1, 5) for m in (2, 12)):
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Flatten(), nn.Linear(50, 301), nn.SiLU(), nn.Linear(301, 303), nn.Linear(303, 3))
        if kind == "shards":
            from torch.distributed.fsdp import fully_shard

            fully_shard(wide[1])
            fully_shard(wide)
        performance = Performance(microbatch=microbatch)
        t = trainer(None, model=wide, augmult=augmult, performance=performance, ema_decay=None, plan=plan(steps=9))
        optimizer = DPOptimizer(t.inner_optimizer, t.plan, t.clipper)
        t._take(1, optimizer)
        with Sent() as counted:
            t._take(2, optimizer)
        numbers = sum(p.numel() for p in wide.parameters())
        found[f"{kind} {augmult} {microbatch}"] = {"bytes": dict(counted.bytes), "numbers": numbers}
    return found


def killed(folder: Path) -> dict[str, Any]:
    """A rank is killed in step 3, after it was charged, in the first life of the group: rank 1 before the sums are
    added up, or rank 0 afterwards.
    """
    ranks, real = Ranks.current(), dpfast.optimizer.add_up
    t = trainer(folder / "state", shards="shards" in os.environ.get("RANK_KIND", ""))

    def add_up(*of: Any) -> None:
        dies = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and calls.total() == 2
        if dies and ranks.rank == 1 and "rank 1" in os.environ["RANK_KIND"]:
            os.kill(os.getpid(), signal.SIGKILL)
        calls["step"] += 1
        real(*of)
        if dies and ranks.rank == 0 and "rank 0" in os.environ["RANK_KIND"]:
            os.kill(os.getpid(), signal.SIGKILL)

    calls: Counter[str] = Counter()
    dpfast.optimizer.add_up = add_up
    t.fit()
    return {"lost": t.lost_steps, "charged": t.charged_steps, "weights": weights(t.model), "life": calls.total()}


class Stopped(Exception):
    pass


class Granted(Allowance):
    """For checkpoints of every step, however long they take on a busy machine."""

    def is_left(self) -> bool:
        return True


dpfast.trainer.Allowance = Granted
dpfast.ranks.sums.BUCKET = 100  # numbers: several buckets


def half(folder: Path) -> dict[str, Any]:
    """Two of four steps, with noise."""

    t = trainer(folder / "state", shards=True)
    take = t._take

    def watched(step: int, optimizer: DPOptimizer) -> None:
        if step == 3:
            raise Stopped
        take(step, optimizer)

    t._take = watched
    try:
        t.fit()
    except Stopped:
        return {"weights": weights(t.model)}
    raise AssertionError("it went on")


def resumed(folder: Path) -> dict[str, Any]:
    """The other two, on other ranks; what it began with."""
    t = trainer(folder / "state", shards=os.environ.get("RANK_KIND") == "shards")
    began: list[Any] = []
    take = t._take

    def watched(step: int, optimizer: DPOptimizer) -> None:
        began.append((step, weights(t.model)))
        take(step, optimizer)

    t._take = watched
    t.fit()
    return {"began": began[0], "charged": t.charged_steps, "lost": t.lost_steps, "statement": t.statement().epsilon}


def own_loop(folder: Path) -> dict[str, Any]:
    """Without a trainer: share, open_ledger, gathered; then what is refused, on every rank."""
    ranks, data = Ranks.current(), Points()
    model, three = cut(network()), plan(steps=3)
    clipper = GhostClipper(model, max_grad_norm=0.5, augmult=1)
    parts = []
    with open_ledger(folder / "ledger.jsonl", three) as ledger:
        optimizer = DPOptimizer(descent(model.parameters()), three, clipper, ledger)
        for _ in range(2):
            part = share(EXAMPLES, three.sample_rate)
            parts.append(part)
            with gathered(model):
                if len(part):
                    with clipper:
                        clipper.backward(model(data.images[part]).square().sum(1))
                optimizer.step()
        charged = ledger.charged_steps
        refused = {
            "not gathered": said(optimizer.step),
            "capture of shards": said(clipper.__enter__),
            "a gradient of one rank": said(lambda: foreign(model, optimizer, ranks)),
            "other weights": said(lambda: DPOptimizer(*fresh(ranks.rank))),
            "alone with shards": said(lambda: DPOptimizer(*sharded(), ranks=Ranks.alone())),
            "rounded shards": said(lambda: gathered(rounded()).__enter__()),
            "another rate": said(lambda: one_step(rate=0.1 * (1 + ranks.rank))),
            "other weights later": said(lambda: one_step(moved=float(ranks.rank))),
            "another plan": said(lambda: DPOptimizer(*fresh(0, plan(steps=3 + ranks.rank)))),
            "another data set": said(lambda: trainer(dataset=Points(2.0 if ranks.rank else 1.0)).fit()),
            "a callback's collective": said(lambda: trainer(shards=True, callbacks=[Gathers()]).fit()),
            "other settings": said(lambda: trainer(seed=ranks.rank).fit()),
            "wrapped": said(lambda: GhostClipper(nn.parallel.DistributedDataParallel(network()), max_grad_norm=1.0)),
            "a locked ledger": said(lambda: open_ledger(folder / "ledger.jsonl", three).__enter__()),
        }
        still = ledger.charged_steps
    return {"parts": parts, "charged": charged, "refused": refused, "still": still, "weights": weights(model)}


def engine(folder: Path) -> dict[str, Any]:
    """Loops of PrivacyEngine: weights without noise over known samples, in physical batches or not; then refusals."""
    ranks = Ranks.current()
    found: dict[str, Any] = {}
    for kind in ("whole", "in parts", "wrapped"):
        samples = iter(SAMPLES)
        dpfast.engine.loader.poisson_sample = lambda *_, samples=samples: torch.tensor(next(samples), dtype=torch.int64)
        model, private = network(), PrivacyEngine(ledger=folder / f"{kind}.jsonl")
        wrapped = nn.parallel.DistributedDataParallel(model) if kind == "wrapped" and ranks.size > 1 else model
        module, optimizer, loader = private.make_private(
            module=wrapped,
            optimizer=descent(model.parameters()),
            data_loader=DataLoader(Points(), batch_size=EXAMPLES // len(SAMPLES)),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
        )
        parts = BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)
        after, seen = [], []
        for images, labels in parts.__enter__() if kind == "in parts" else loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images), labels).backward()
            optimizer.step()
            after.append(weights(model))
            seen.append(len(labels))
        found[kind] = {"weights": after[-1], "charged": len(private.accountant), "seen": sum(seen)}
        private.close()
    found["refused"] = said(lambda: looped(Points(2.0 if ranks.rank else 1.0)))
    found["skipped"] = said(skipping)
    return found


def skipping() -> None:
    """Empty batches left out, as loops of Opacus do: the parts of two samples would meet in a step."""
    samples = iter([[0], [1, 0], [1, 2], [3, 4]])
    dpfast.engine.loader.poisson_sample = lambda *_: torch.tensor(next(samples), dtype=torch.int64)
    module, optimizer, loader = looped(Points())
    try:
        for images, labels in loader:
            if len(labels):
                nn.functional.cross_entropy(module(images), labels).backward()
                optimizer.step()
    except DPFastError as error:
        if Ranks.current().rank:  # rank 0 waits in its step, and would end when this process does
            Ranks.current().agree(error)
        raise


def looped(data: Points) -> Any:
    model = network()
    return PrivacyEngine().make_private(
        module=model,
        optimizer=descent(model.parameters()),
        data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
    )


def fresh(seed: int, its: Plan | None = None) -> tuple[Any, ...]:
    model = network(seed)
    return descent(model.parameters()), its or plan(), GhostClipper(model, max_grad_norm=0.5)


def sharded() -> tuple[Any, ...]:
    model = cut(network())
    return descent(model.parameters()), plan(), GhostClipper(model, max_grad_norm=0.5)


def rounded() -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    return fully_shard(network(), mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))


def one_step(rate: float = 0.1, moved: float = 0.0) -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer = DPOptimizer(inner, plan(), GhostClipper(model, max_grad_norm=0.5))
    with torch.no_grad():
        model[0].weight += moved
    optimizer.step()


def foreign(model: nn.Module, optimizer: DPOptimizer, ranks: Ranks) -> None:
    with gathered(model):
        if ranks.rank == ranks.size - 1:
            next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        try:
            optimizer.step()
        finally:
            next(model.parameters()).grad = None


KEPT: list[Any] = []  # beyond the process group


def lasting(_: Path) -> dict[str, Any]:
    """A trainer that is there until Python ends, after its process group."""
    KEPT.append(trainer())
    KEPT[0].fit()
    before, ranks = threads(), Ranks.current()
    dist.destroy_process_group()
    return {"before": before, "after": threads(), "said": said(ranks.wait)}


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except DPFastError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def carry_out(tasks: dict[str, Any], task: str, folder: str) -> None:
    """One of the tasks, on each rank; what it returns is left in the folder."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    path = Path(folder) / f"{task}-{Ranks.current().rank}.pt"
    torch.save(tasks[task](Path(folder)), path)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # A mesh keeps gloo's threads beyond that, and one that lets go of a tensor while Python ends aborts the process
        # (torch's issue 190489).
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    carry_out(globals(), *sys.argv[1:])
