"""Ordinary training on public data. Nothing here is private: never give it images that need protection."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpfast import checkpoint as checkpoints
from dpfast.data.images import ImageSet, batch_indices
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError
from dpfast.objective import Objective
from dpfast.performance import Dtype
from dpfast.progress import Progress, silent
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


class _Training:
    """Everything that changes from step to step, and so everything a checkpoint holds."""

    def __init__(self, model: nn.Module, spec: PretrainSpec, dtype: Dtype) -> None:
        self.model, self.spec, self.dtype = model, spec, dtype
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(spec.ema_decay))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=spec.learning_rate, total_steps=spec.steps
        )
        self.losses: list[float] = []

    def step(self, objective: Objective, dataset: ImageSet, device: torch.device) -> None:
        step = len(self.losses)
        ids = batch_indices(len(dataset), self.spec.batch_size, step, seed=self.spec.seed)
        images, labels = dataset.images[ids].to(device), dataset.labels[ids].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = objective(self.model, images, labels, RowKeys(self.spec.seed, ids.to(device), step)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.losses.append(float(loss.detach()))

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.ema, self.optimizer, self.schedule

    def state(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts()], "losses": list(self.losses)}

    def load(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(saved)
        self.losses = list(state["losses"])


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
) -> list[float]:
    """Train ``model`` in place on public images, leave the averaged weights in it, return the loss of each step.

    With ``checkpoint`` the work can be interrupted at any time: the next call with the same ``fingerprint`` goes
    on from the file and ends with the same weights. dtype: that the objective is computed in, by autocast.

    Raises:
        CheckpointError: the file belongs to other settings.
    """
    device = next(model.parameters()).device
    training = _Training(model.train(), spec, dtype)
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoints.load(checkpoint, kind=_KIND, fingerprint=fingerprint))
    while len(training.losses) < spec.steps:
        with seeded(spec.seed + len(training.losses), device):  # dropout, the only global randomness
            training.step(objective, dataset, device)
        done = len(training.losses)
        if checkpoint is not None and (done % spec.checkpoint_every == 0 or done == spec.steps):
            checkpoints.save(checkpoint, training.state(), kind=_KIND, fingerprint=fingerprint)
        progress(done, spec.steps, "pre-training on public images")
    model.load_state_dict(training.ema.module.state_dict())
    model.eval()
    return training.losses
