"""Ordinary training on public data. Nothing here is private: never give it images that need protection."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpfast import checkpoint as checkpoints
from dpfast.data.images import ImageSet, batch_indices
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError
from dpfast.objective import Objective
from dpfast.performance import Dtype
from dpfast.progress import Progress, silent
from dpfast.ranks import Ranks
from dpfast.seeding import seeded

_KIND = "pretrain"


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """AdamW with a one-cycle learning rate, gradients clipped to norm 1 (the batch's, not each example's), and an
    exponential moving average of the weights.

    ``seed`` fixes the order of images and all randomness of the loss. Checkpoints are ``checkpoint_every`` steps
    apart.
    """

    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    ema_decay: float = 0.995
    seed: int = 0
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PretrainSpec({name}={getattr(self, name)}): expected 1 or more")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"PretrainSpec(ema_decay={self.ema_decay}): expected 0 <= decay < 1")


class _Losses(nn.Module):
    """The objective of a model, as a module: what ``DistributedDataParallel`` wraps, so that the objective meets the
    model itself.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *arguments: Any) -> Tensor:
        return self.objective(self.model, *arguments)


class _Training:
    """Everything that changes from step to step, and so everything a checkpoint holds."""

    def __init__(self, model: nn.Module, objective: Objective, spec: PretrainSpec, dtype: Dtype, ranks: Ranks) -> None:
        self.model, self.spec, self.dtype, self.ranks = model, spec, dtype, ranks
        self.objective: nn.Module = _Losses(model, objective)
        if ranks.size > 1:
            # Rank 0's weights for all, before they are averaged. The graph: a parameter that no loss needs is no error.
            self.objective = nn.parallel.DistributedDataParallel(self.objective, static_graph=True)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(spec.ema_decay))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=spec.learning_rate, total_steps=spec.steps
        )
        self.losses: list[float] = []

    def step(self, dataset: ImageSet, device: torch.device) -> None:
        step, ranks = len(self.losses), self.ranks
        batch = batch_indices(len(dataset), self.spec.batch_size, step, seed=self.spec.seed)
        mine = batch[ranks.rank :: ranks.size]
        # The ranks' gradients are averaged: so weighted, the average is the gradient of the whole batch's mean.
        weight = len(mine) * ranks.size / len(batch)
        ids = mine if len(mine) else batch[:1]  # of more ranks than images; its weight is 0
        images, labels = dataset.images[ids].to(device), dataset.labels[ids].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            losses = self.objective(images, labels, RowKeys(self.spec.seed, ids.to(device), step))
        loss = losses.mean() * weight
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.losses.append(self._of_all(loss.detach()))

    def _of_all(self, loss: Tensor) -> float:
        """The loss of the whole batch."""
        if self.ranks.size > 1:
            dist.all_reduce(loss)
        return float(loss) / self.ranks.size

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.ema, self.optimizer, self.schedule

    def state(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts()], "losses": list(self.losses)}

    def load(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(saved)
        self.losses = list(state["losses"])


@dataclass(frozen=True)
class _Checkpoint:
    """A file of rank 0's; on other machines there may be none."""

    path: Path
    fingerprint: str
    ranks: Ranks

    def load(self, training: _Training) -> None:
        """What it holds, on every rank, if it is there."""
        content = self.ranks.first(lambda: checkpoints.read(self.path) if self.path.exists() else None)
        if content is not None:
            of = {"kind": _KIND, "fingerprint": self.fingerprint}
            training.load(checkpoints.load(self.path, content=content, **of))

    def save(self, training: _Training) -> None:
        of = {"kind": _KIND, "fingerprint": self.fingerprint}
        self.ranks.first(lambda: checkpoints.save(self.path, training.state(), **of))


def pretrain(
    model: nn.Module,
    objective: Objective,
    dataset: ImageSet,
    spec: PretrainSpec,
    *,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    dtype: Dtype = "float32",
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> list[float]:
    """Train ``model`` in place on public images, leave the averaged weights in it, return the loss of each step.

    With ``checkpoint`` the work can be interrupted at any time: the next call with the same ``fingerprint`` goes
    on from the file and ends with the same weights. dtype: that the objective is computed in, by autocast.
    ranks: ``torch.distributed``'s processes by default, which train together: all of them call this with the same
    arguments, each computes its part of every batch, and all end with the weights that one would (up to rounding, and
    dropout). Rank 0 alone reads and writes the checkpoint, and is heard.

    Raises:
        CheckpointError: the file belongs to other settings.
    """
    ranks = ranks or Ranks.current()
    device = next(model.parameters()).device
    training = _Training(model.train(), objective, spec, dtype, ranks)
    keep = None if checkpoint is None else _Checkpoint(checkpoint, fingerprint, ranks)
    if keep is not None:
        keep.load(training)
    while len(training.losses) < spec.steps:
        # Of dropout, the only global randomness; each rank has masks of its own.
        with seeded(spec.seed + len(training.losses) + (ranks.rank << 32), device):
            training.step(dataset, device)
        done = len(training.losses)
        if keep is not None and (done % spec.checkpoint_every == 0 or done == spec.steps):
            keep.save(training)
        if ranks.leads:
            progress(done, spec.steps, "pre-training on public images")
    model.load_state_dict(training.ema.module.state_dict())
    model.eval()
    return training.losses
