"""What test_runs_ranks.py has every rank do: ``python run_worker.py TASK FOLDER [ARGUMENTS]`` under torchrun."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dpfast.diffusion.sampler as sampler
import dpfast.evaluation.studies as studies
import dpfast.optimizer
import dpfast.runs.evaluation as evaluation
from dpfast.data import font_digits
from dpfast.diffusion.pretrain import PretrainSpec, _Training, pretrain
from dpfast.diffusion.sampler import generate_shards
from dpfast.errors import ConfigError
from dpfast.evaluation import ClassifierSpec
from dpfast.evaluation.studies import accuracy_by_count
from dpfast.ranks import Ranks
from rank_worker import carry_out

CLASSES = ("a", "b")
LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


class Network(nn.Module):
    """Takes images, timesteps and labels; one of its parameters no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.labels = nn.Embedding(11, 8)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.first(x) + self.labels(labels)[:, :, None, None]))


def shards(folder: Path) -> dict[str, Any]:
    """Seven shards of noise made into images; how many each rank drew, and what was heard of it."""
    from diffusers import DDPMScheduler

    drawn, heard, generate = [0], [], sampler.generate

    def counted(*of: Any, **options: Any) -> Tensor:
        drawn[0] += 1
        return generate(*of, **options)

    sampler.generate = counted
    options = {"count": 26, "shard_size": 4, "image_shape": (1, 8, 8), "classes": CLASSES, "steps": 2, "batch_size": 2}
    made = generate_shards(
        Network(), DDPMScheduler(), folder / "shards", progress=lambda done, of, _: heard.append((done, of)), **options
    )
    there = len(made.load())
    sampler.generate = generate
    said = refusal(
        lambda: generate_shards(Network(), DDPMScheduler(), folder / "x", seed=Ranks.current().rank, **options)
    )
    return {"drawn": drawn[0], "heard": heard, "there": there, "refused": said}


def objective(model: nn.Module, images: Tensor, labels: Tensor, keys: Any) -> Tensor:
    noise = keys.normal(1, 8, 8, stream="noise")
    return (model(images / 127.5 - 1 + noise, keys.ids, labels) - noise).square().flatten(1).mean(1)


class Stopped(Exception):
    pass


def pretraining(folder: Path) -> dict[str, Any]:
    """Of batches that are dealt out unevenly, and of batches of fewer images than ranks; one that is stopped."""
    found: dict[str, Any] = {}
    fonts = font_digits(30, seed=0)
    for size in (5, 1):
        spec = PretrainSpec(steps=6, batch_size=size, learning_rate=0.02, checkpoint_every=2)
        model = Network()
        losses = pretrain(model, objective, fonts, spec)
        found[str(size)] = {"weights": model.state_dict(), "losses": losses}
        model.zero_grad()
        model(torch.ones(1, 1, 8, 8), torch.zeros(1), torch.zeros(1).long()).sum().backward()  # of this rank alone
    spec = PretrainSpec(steps=6, batch_size=5, learning_rate=0.02, checkpoint_every=2)
    take = _Training.step

    def stopping(self: Any, *of: Any) -> None:
        if len(self.losses) == 3:
            raise Stopped
        take(self, *of)

    _Training.step = stopping
    # A folder that only rank 0 writes to, and the others never read.
    path = folder / f"of rank {Ranks.current().rank}" / "checkpoint"
    try:
        pretrain(Network(), objective, fonts, spec, checkpoint=path)
    except Stopped:
        _Training.step = take
    model = Network()
    again = pretrain(model, objective, fonts, spec, checkpoint=path)
    found["again"] = {"weights": model.state_dict(), "losses": again}
    found["checkpoint"] = path.exists()
    return found


def studying(_: Path) -> dict[str, Any]:
    """Accuracies by count; the classifiers that each rank has trained."""
    fonts = font_digits(60, seed=0)
    trained, real = [0], studies.train_classifier

    def counted(*of: Any, **options: Any) -> Any:
        trained[0] += 1
        return real(*of, **options)

    studies.train_classifier = counted
    results: dict[str, Any] = {}
    found = accuracy_by_count(
        fonts, fonts, counts=[20, 40], spec=ClassifierSpec(steps=2), seeds=[0, 1], results=results
    )
    again = accuracy_by_count(
        fonts, fonts, counts=[20, 40], spec=ClassifierSpec(steps=2), seeds=[0, 1], results=results
    )
    said = [(point.count, list(point.accuracies), point.ensemble) for point in found]
    return {"found": said, "trained": trained[0], "kept": len(results), "same": found == again}


def pieces(folder: Path) -> dict[str, Any]:
    return {"shards": shards(folder), "pretraining": pretraining(folder), "studying": studying(folder)}


def refusal(act: Any) -> str:
    try:
        act()
    except ConfigError as error:
        return str(error)
    return "nothing"


def alone(_: Path) -> None:
    """Rank 1 alone meets an error, while the others wait for it."""
    from dpfast.console import reported
    from dpfast.runs.launch import together

    with reported(debug=False), together() as ranks:
        if ranks.rank == 1:
            raise ConfigError("only here")
        ranks.wait()


def killed(folder: Path, *arguments: str) -> None:
    """The command; rank 1 is killed in a private step in its first life, in the evaluation in its second."""
    from dpfast.cli import app

    rank, real, calls = os.environ["RANK"], dpfast.optimizer.add_up, [0]

    def add_up(*of: Any) -> None:
        calls[0] += 1
        if (rank, LIFE, calls[0]) == ("1", "0", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*of)

    set_item = evaluation.Results.__setitem__

    def kept(self: Any, key: str, value: Any) -> None:
        set_item(self, key, value)
        if (rank, LIFE) == ("1", "1") and not key.endswith("probabilities"):
            (folder / "kept").write_text(key)
            os.kill(os.getpid(), signal.SIGKILL)

    work_off = evaluation.work_off

    def noted(tasks: Any, results: Any, ranks: Ranks) -> None:
        if (rank, LIFE) == ("0", "2"):
            (folder / "missing").write_text("\n".join(name for name in tasks if name not in results))
        work_off(tasks, results, ranks)

    evaluation.work_off = noted

    dpfast.optimizer.add_up = add_up
    evaluation.Results.__setitem__ = kept
    app(arguments)


def main(task: str, folder: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if task == "killed":
        killed(Path(folder), *arguments)
        return
    if task == "alone":
        alone(Path(folder))
        return
    carry_out(globals(), task, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
