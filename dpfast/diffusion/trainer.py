"""DPTrainer: a model, a data set and a plan in; a privately trained model out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate

from dpfast import checkpoint
from dpfast.clipping import GhostClipper
from dpfast.data.images import ImageSet
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError, PrivacyError
from dpfast.objective import Objective
from dpfast.optimizer import DPOptimizer
from dpfast.performance import Performance
from dpfast.privacy import Ledger, Plan, poisson_sample, random_bytes
from dpfast.progress import Progress, silent
from dpfast.seeding import seeded

CHECKPOINTS = 50  # at least this many over a run: a kill loses at most 2% of the steps
NUMBERS = 1 << 16  # of a physical batch: 1024 rows of 8x8 pixels cost 35% less each than 256 (2 cores)


class Dataset(Protocol):
    """Numbered examples: an ``ImageSet``, or anything whose items ``default_collate`` can batch."""

    def __len__(self) -> int: ...


OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class DPTrainer:
    """DP-SGD with augmentation multiplicity (Ghalebikesabi et al., arXiv 2302.13861).

    model: trained in place, in the mode (train or eval) that each of its layers is in; frozen parameters stay.
    dataset: an ``ImageSet`` (images uint8, labels), or any sequence of tensors or tuples of tensors.
    plan: everything that moves epsilon.
    objective: losses per row, given the examples of a batch and their ``RowKeys``.
    optimizer: makes a torch optimizer from parameters; its learning rate is reached after ``warmup_steps``.
    augmult: K, the rows made of each example.
    seed: of augmentation, timesteps and diffusion noise, keyed by example. It reaches neither the privacy noise nor the
        sampling nor dropout, which come from the operating system.
    state_dir: ledger and checkpoint; None keeps the ledger in memory and writes nothing.
    ema_decay: of the averaged copy of the model, ``ema_model``.

    Guarantee: ``model``, ``ema_model`` and everything in ``state_dir`` are an (epsilon, delta)-private function of
    ``dataset`` with ``plan.epsilon(ledger.charged_steps)``: each step takes a fresh Poisson sample, clips each
    example's mean gradient over its K rows, and adds noise through ``DPOptimizer``, the ledger written first.
    Training that was cut off goes on after the last *charged* step: what was charged and not saved is lost, never
    run again (``lost_steps``).
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        plan: Plan,
        *,
        objective: Objective,
        optimizer: OptimizerFactory,
        augmult: int = 1,
        seed: int = 0,
        performance: Performance | None = None,
        state_dir: str | Path | None = None,
        ema_decay: float | None = None,
        warmup_steps: int = 0,
        progress: Progress = silent,
    ) -> None:
        if len(dataset) != plan.dataset_size:
            raise PrivacyError(
                f"the data set has {len(dataset)} examples, the plan was made for {plan.dataset_size}: make the plan"
                " with dataset_size=len(dataset)"
            )
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ConfigError(f"ema_decay={ema_decay!r}: expected 0 <= decay < 1, or None")
        self.performance = performance or Performance()
        self.model = model.to(self.performance.device)
        self.dataset, self.plan, self.objective = dataset, plan, objective
        self.augmult, self.seed, self.warmup_steps = augmult, seed, warmup_steps
        self.progress = progress
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.clipper = GhostClipper(
            model, max_grad_norm=plan.max_grad_norm, augmult=augmult, performance=self.performance
        )
        self.inner_optimizer = optimizer(list(self.clipper.parameters.values()))
        self.learning_rates = [group["lr"] for group in self.inner_optimizer.param_groups]
        self.ema = None if ema_decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.lost_steps = 0
        self._memory = Ledger(None, plan)
        self._numbers_per_example = self._examples(torch.zeros(min(1, len(dataset)), dtype=torch.int64), 1)[0].numel()

    @property
    def ema_model(self) -> nn.Module:
        """The averaged model, or the model itself without ``ema_decay``."""
        return self.model if self.ema is None else self.ema.module

    def fit(self) -> None:
        """Take every step of the plan that is not charged yet. Can be interrupted and called again at any time."""
        with self._ledger() as ledger:
            optimizer = DPOptimizer(self.inner_optimizer, self.plan, self.clipper, ledger)
            self._resume(ledger.charged_steps)
            for step in range(ledger.charged_steps + 1, self.plan.steps + 1):
                self._take(step, optimizer)
                if step % max(1, self.plan.steps // CHECKPOINTS) == 0 or step == self.plan.steps:
                    self._save(step)
                self.progress(step, self.plan.steps, self._message())

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        """The ledger on disk, locked for as long as it is used, or the one in memory, which lives with the trainer."""
        if self.state_dir is None:
            yield self._memory
        else:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            with Ledger(self.state_dir / "ledger.jsonl", self.plan) as ledger:
                yield ledger

    def _take(self, step: int, optimizer: DPOptimizer) -> None:
        """One private step over one Poisson sample, empty or not."""
        for group, rate in zip(optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * min(1.0, step / max(1, self.warmup_steps))
        optimizer.zero_grad()  # what an interrupted step has summed belongs to a sample that is gone
        sample = poisson_sample(self.plan.dataset_size, self.plan.sample_rate)
        for ids, mask in self._microbatches(sample):
            self._accumulate(step, ids, mask)
        optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _microbatches(self, sample: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[m]`` and mask ``[m]`` of physical batches of few sizes; padding has ids beyond the data set."""
        largest = self._largest_microbatch()
        for ids in sample.split(largest):
            size = largest
            while size // 2 >= max(len(ids), largest // 8, 1):
                size //= 2
            padding = torch.arange(size - len(ids)) + self.plan.dataset_size
            yield torch.cat([ids, padding]), torch.arange(size) < len(ids)

    def _largest_microbatch(self) -> int:
        """Examples of a full physical batch."""
        if self.performance.form == "example":
            return 1
        return self.performance.microbatch or max(1, NUMBERS // (self.augmult * self._numbers_per_example))

    def _accumulate(self, step: int, ids: Tensor, mask: Tensor) -> None:
        device = self.performance.device
        examples = [x.to(device) for x in self._examples(ids[mask], len(ids))]
        keys = RowKeys(self.seed, ids.to(device), step, self.augmult)
        # Dropout masks belong to places in a batch, so they are drawn anew, from the system: a mask known beforehand
        # would change with an example's neighbours, and one example could move the share of all others.
        dropout = int.from_bytes(random_bytes(8), "little") >> 1
        with seeded(dropout, device), self.clipper:
            losses = self.objective(self.model, *examples, keys)
            self.clipper.backward(losses, example_mask=mask.to(device))

    def _examples(self, ids: Tensor, size: int) -> tuple[Tensor, ...]:
        """The examples' tensors, each padded with zeros to ``[size, ...]``."""
        if isinstance(self.dataset, ImageSet):
            batch: Any = (self.dataset.images[ids], self.dataset.labels[ids])
        else:
            template = ids if len(ids) else [0]  # an empty batch still has shapes and dtypes
            batch = default_collate([self.dataset[int(i)] for i in template])  # type: ignore[index]
        tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        kept = [x[: len(ids)] for x in tensors]
        return tuple(torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in kept)

    # Interruption

    def _parts(self) -> list[Any]:
        return [self.model, self.inner_optimizer, *([] if self.ema is None else [self.ema])]

    def _save(self, step: int) -> None:
        if self.state_dir is not None:
            state = {
                "parts": [p.state_dict() for p in self._parts()],
                "step": step,
                "lost_steps": self.lost_steps,
            }
            checkpoint.save(
                self.state_dir / "checkpoint",
                state,
                kind="private training",
                fingerprint=self.plan.fingerprint(),
            )

    def _resume(self, charged: int) -> None:
        """Load the last checkpoint; steps charged after it are spent and lost."""
        if self.state_dir is None:
            return  # the model in memory is where the ledger in memory is
        saved = 0
        if (self.state_dir / "checkpoint").exists():
            state = checkpoint.load(
                self.state_dir / "checkpoint", kind="private training", fingerprint=self.plan.fingerprint()
            )
            for part, values in zip(self._parts(), state["parts"], strict=True):
                part.load_state_dict(values)
            saved, self.lost_steps = state["step"], state["lost_steps"]
        if saved > charged:
            raise PrivacyError(
                f"the checkpoint is at step {saved}, the ledger at {charged}: the ledger was cut or replaced. Restore"
                " the ledger that belongs to the checkpoint, or start anew in another folder with a new budget"
            )
        self.lost_steps += charged - saved
        if charged:
            self.progress(charged, self.plan.steps, self._message())

    def _message(self) -> str:
        lost = f" ({self.lost_steps} charged steps lost to interruptions)" if self.lost_steps else ""
        return f"private training{lost}"
