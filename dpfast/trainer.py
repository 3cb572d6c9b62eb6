"""DPTrainer: a model, a data set and a plan in; a privately trained model out."""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpfast import checkpoint
from dpfast.callbacks import Callback, Callbacks
from dpfast.clipping import GhostClipper
from dpfast.clipping.planner import StepPlan, plan_step
from dpfast.clipping.rule import Clipping
from dpfast.data.examples import Dataset, Examples
from dpfast.data.keyed import RowKeys
from dpfast.diagnostics import Spent, StepReport
from dpfast.errors import CheckpointError, ConfigError, DPFastError, PrivacyError
from dpfast.files import make_folder
from dpfast.objective import Objective
from dpfast.optimizer import DPOptimizer
from dpfast.pace import Allowance, Pace
from dpfast.performance import Performance
from dpfast.physical import Batch, Size, is_out_of_memory, largest_fitting, usual_size
from dpfast.privacy import Ledger, Plan, PrivacyStatement, poisson_sample, random_bytes, read_ledger
from dpfast.probe import PROBED_EXAMPLES, show_objective
from dpfast.progress import Progress, silent
from dpfast.ranks import RankLedger, Ranks, gathered
from dpfast.ranks.ledger import kept_by_first
from dpfast.ranks.shards import Average, full_state, is_sharded, load_full_state
from dpfast.ranks.team import check_data
from dpfast.schedules import LearningRates, Schedule
from dpfast.seeding import seeded
from dpfast.unnoised import Unnoised

CHECKPOINTS = 50  # over a run, or fewer where writing them would take more than its allowance (``pace``)
_ANEW = "begin anew in another folder, with a budget that adds to what is spent here"

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _averaged(model: nn.Module, decay: float) -> AveragedModel | Average:
    if is_sharded(model):
        return Average(model, decay)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def _unknown_seed() -> int:
    return int.from_bytes(random_bytes(8), "little") >> 1


class DPTrainer:
    """DP-SGD with augmentation multiplicity (Ghalebikesabi et al., arXiv 2302.13861).

    For example::

        def objective(model, images, labels, keys):  # B examples in, B*K losses out
            rows = images.repeat_interleave(keys.augmult, 0)  # row i*K + k
            rows = rows + 0.1 * keys.normal(*rows.shape[1:], stream="noise")  # each row its own
            return cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")

        trainer = DPTrainer(model, dataset, plan, objective=objective, optimizer=torch.optim.Adam, augmult=4)
        trainer.fit()

    model: trained in place, in the mode (train or eval) that each of its layers is in; frozen parameters stay.
    dataset: an ``ImageSet`` (images uint8, labels), or anything whose items are tensors or tuples of tensors.
    plan: everything that moves epsilon.
    objective: losses per row, given the examples of a batch and their ``dpfast.data.keyed.RowKeys`` (random numbers
        that belong to an example and a step, not to a place in the batch); ``DiffusionObjective`` is one.
    optimizer: makes a torch optimizer from parameters; its learning rate is reached after ``warmup_steps``,
        and moves by ``schedule``: a function from the number of steps before to a factor, or what makes a scheduler of
        torch from an optimizer (``dpfast.schedules.LearningRates``). That of a step depends on its number alone.
    augmult: K, the rows made of each example.
    clipping, stability: how gradients are clipped to the plan's ``max_grad_norm``, as ``GhostClipper`` has it.
    seed: of augmentation, timesteps and diffusion noise, keyed by example. It reaches neither the privacy noise nor the
        sampling nor dropout nor random transforms of the data set, which come from the operating system.
    state_dir: ledger and checkpoint, of one data set (another of the same size is not noticed); None keeps the ledger
        in memory and writes nothing. Checkpoints are written 50 times over a run, less often where that takes more than
        0.5% of the time.
    performance: ``microbatch`` examples run at a time; by default as many as make some 65,000 numbers of input (two
        million on a GPU), and no more than the expected batch; fewer, down to some rows of one, where
        ``memory_budget`` asks for it.
    progress: called as ``progress(step, steps, message)`` after each step.
    callbacks: hear of each step (``dpfast.callbacks``: ``CSVLogger``, ``TensorBoardLogger``, one's own); what they
        raise ends the training, which can go on later.
    ema_decay: of the averaged copy of the model, ``ema_model``.
    ranks: the processes that train together, ``torch.distributed``'s by default (``dpfast.ranks``): all of them make
        the same trainer and call ``fit``, which is a collective. The model may be cut by ``fully_shard``.
    unsafe_debug: the message of a step says what nothing says without: how many examples it drew, their mean loss, the
        median and the largest norm, and the share that was clipped, none of it noised. Epsilon does not cover whoever
        sees that: the ledger is marked before, for good, and with it every statement of what it holds.

    Guarantee: ``model``, ``ema_model`` and everything in ``state_dir`` are an (epsilon, delta)-private function of
    ``dataset`` with ``trainer.epsilon``: each step takes a fresh Poisson sample, clips each example's mean gradient
    over its K rows, and adds noise through ``DPOptimizer``, the ledger written first. Before the first step the
    objective is run on synthetic examples: one that mixes them is refused. Training that was cut off goes on after the
    last *charged* step: what was charged and not saved is lost, never run again (``lost_steps``, known once ``fit``
    goes on). ``epsilon`` is that of the steps charged; a training that is ended early by what it has shown owes that of
    the plan.
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
        clipping: Clipping = "flat",
        stability: float = 0.01,
        seed: int = 0,
        performance: Performance | None = None,
        state_dir: str | Path | None = None,
        ema_decay: float | None = None,
        warmup_steps: int = 0,
        progress: Progress = silent,
        unsafe_debug: bool = False,
        schedule: Schedule | None = None,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.examples = Examples(dataset)
        if len(dataset) != plan.dataset_size:
            raise PrivacyError(
                f"the data set has {len(dataset)} examples, the plan was made for {plan.dataset_size}: make the plan"
                " with dataset_size=len(dataset)"
            )
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ConfigError(f"ema_decay={ema_decay!r}: expected 0 <= decay < 1, or None")
        if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "optimizer: expected what makes one from parameters, like torch.optim.Adam or"
                f" lambda parameters: torch.optim.SGD(parameters, lr=0.1); got a {type(optimizer).__name__}"
            )
        self.ranks = ranks or Ranks.current()
        self.performance = performance or Performance()
        self.model = model.to(self.performance.device)
        self.plan, self.objective = plan, objective
        self.augmult, self.seed, self.warmup_steps = augmult, seed, warmup_steps
        self.progress = progress if self.ranks.leads else silent
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.clipper = GhostClipper(
            model,
            max_grad_norm=plan.max_grad_norm,
            augmult=augmult,
            clipping=clipping,
            stability=stability,
            performance=self.performance,
        )
        self.inner_optimizer = optimizer(list(self.clipper.parameters.values()))
        self.rates = LearningRates(self.inner_optimizer, schedule, steps=plan.steps, warmup_steps=warmup_steps)
        self.callbacks, self._spent = tuple(callbacks), Spent(plan)
        self.ema = None if ema_decay is None else _averaged(model, ema_decay)
        self.lost_steps = 0
        given = (state_dir is None, unsafe_debug, ema_decay, is_sharded(model), len(dataset), self._settings())
        self.ranks.alike("settings", repr(given), "Give the same to all ranks")
        self.charged_steps = self.ranks.first(self._charged)
        self._unsafe_debug = unsafe_debug
        self._unnoised: Unnoised | None = None  # of the step that is taken, where they are to be shown
        self._memory = Ledger(None, plan, unsafe_debug=unsafe_debug)
        self._numbers_per_example = self.examples.batch(torch.arange(min(1, len(dataset))), 1)[0].numel()

    @property
    def ema_model(self) -> nn.Module:
        """The averaged model, or the model itself without ``ema_decay``.

        Raises ConfigError for a model in shards: of that there is no second one (``averaged``).
        """
        if isinstance(self.ema, Average):
            raise ConfigError("the model is in shards, and so are its averages: use `with trainer.averaged() as model`")
        return self.model if self.ema is None else self.ema.module

    def averages(self) -> list[Tensor] | None:
        """Of the parameters, in their order, as the averaged model has them; None without ``ema_decay``."""
        if self.ema is None:
            return None
        return self.ema.means if isinstance(self.ema, Average) else list(self.ema.module.parameters())

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """``ema_model``; of a model in shards the model itself, which has the averages for its parameters meanwhile."""
        if isinstance(self.ema, Average):
            with self.ema.swapped_in() as model:
                yield model
        else:
            yield self.ema_model

    @property
    def epsilon(self) -> float:
        """Spent by the steps charged so far, the plan's other releases included, at the plan's delta."""
        return self.plan.epsilon(self.charged_steps)

    def fit(self) -> None:
        """Take every step of the plan that is not charged yet. Can be interrupted and called again at any time.

        Raises ``CaptureError`` when the model or the objective mixes examples, ``CheckpointError`` when the checkpoint
        in ``state_dir`` is damaged, missing or of another model or plan, ``LedgerError`` likewise.
        """
        if self._unsafe_debug:
            warnings.warn(
                "unsafe_debug: losses and norms of private examples are shown without noise. Epsilon does not cover"
                " whoever sees them, which the ledger and every privacy statement will say from now on",
                stacklevel=2,
            )
        with self._ledger() as ledger, Callbacks(self.callbacks, self) as callbacks:
            self.charged_steps = ledger.charged_steps
            self._meet()
            optimizer = DPOptimizer(self.inner_optimizer, self.plan, self.clipper, ledger, ranks=self.ranks)
            self._resume(ledger.charged_steps)
            callbacks.begin(self.inner_optimizer)
            pace, saving = Pace(), Allowance()
            if ledger.charged_steps < self.plan.steps:
                self._show_objective()
            for step in range(ledger.charged_steps + 1, self.plan.steps + 1):
                if step == self.plan.steps:  # whatever weights came to do is seen before they are used
                    pace.insist()
                if self.ranks.first(pace.take):
                    with pace.spending(repeated=True):
                        self._show_objective(seed=step)
                try:
                    self._take(step, optimizer)
                finally:
                    self.charged_steps = ledger.charged_steps
                pace.changed("steps")
                due = step % max(1, self.plan.steps // CHECKPOINTS) == 0 and self.ranks.first(saving.is_left)
                if step == self.plan.steps or due:
                    with saving.spending():
                        self._save(step)
                callbacks.step(step)
                self.progress(step, self.plan.steps, self._unnoised_message() + self._message())

    def report_of(self, step: int) -> StepReport:
        """What is known of step ``step``, counted from 1, without diagnostics: before it is taken or after."""
        rates = tuple(float(rate) for rate in self.rates.at(step))
        expected = self.plan.expected_batch_size
        return StepReport(step, self.plan.steps, self.lost_steps, rates, expected, None, self._spent)

    def statement(
        self,
        *,
        public: Sequence[str] = ("The number of examples.", "The weights that training began with."),
        not_accounted: Sequence[str] = ("How settings (learning rate, steps, clip norm) were chosen.",),
        example: str = "image",
        subject: str | None = None,
    ) -> PrivacyStatement:
        """What to give away with the model and its samples: ``trainer.statement().write(folder)``.

        public: what is treated as known to everybody; not_accounted: what was learned from the data beside the training
        (sentences, for the reader). example: what one is, "image", "text", "signal"; subject: what the statement is
        about, by default the model and every example sampled from it.
        """
        path = self._ledger_path()
        spent = self._memory if path is None or not path.exists() else read_ledger(path)  # the file is that of rank 0
        return PrivacyStatement.of(
            spent,
            augmult=self.augmult,
            public=public,
            not_accounted=not_accounted,
            example=example,
            subject=subject,
        )

    def _ledger_path(self) -> Path | None:
        return None if self.state_dir is None else self.state_dir / "ledger.jsonl"

    def _charged(self) -> int:
        """By earlier processes."""
        path = self._ledger_path()
        return read_ledger(path).charged_steps if path is not None and path.exists() else 0

    @contextmanager
    def _ledger(self) -> Iterator[Ledger | RankLedger]:
        """The ledger on disk, locked for as long as it is used, or the one in memory, which lives with the trainer."""
        with ExitStack() as stack:
            kept = self._memory
            if self.state_dir is not None:
                on_disk = kept_by_first(self.ranks, self._ledger_on_disk, self.plan)
                kept = stack.enter_context(on_disk) if self.ranks.leads else kept
            yield kept if self.ranks.size == 1 else RankLedger(kept, self.ranks)

    def _ledger_on_disk(self) -> Ledger:
        path = self._ledger_path()
        assert path is not None
        try:
            make_folder(path.parent)
        except OSError as error:
            raise ConfigError(
                f"state_dir={str(path.parent)!r}: no folder can be made there ({error.strerror})"
            ) from error
        return Ledger(path, self.plan, unsafe_debug=self._unsafe_debug)

    def _meet(self) -> None:
        """Ranks begin alike: with the weights and buffers of rank 0, its settings and its data set."""
        if self.ranks.size == 1:
            return
        check_data(self.ranks, len(self.examples), lambda few: self.examples.batch(torch.tensor(few), len(few)))
        models = [self.model] if self.ema is None else [self.model, self.ema]
        for model in models:
            if isinstance(model, nn.Module) and not is_sharded(model):
                self.ranks.copy_from_first(model.parameters())
                self.ranks.copy_from_first(model.buffers())

    # One step

    def _take(self, step: int, optimizer: DPOptimizer) -> None:
        """One private step over one Poisson sample, empty or not."""
        for group, rate in zip(optimizer.param_groups, self.rates.at(step), strict=True):
            group["lr"] = rate
        self._unnoised = Unnoised() if self._unsafe_debug else None
        with gathered(self.model):
            optimizer.zero_grad()  # what an interrupted step has summed belongs to a sample that is gone
            sample, largest = self.ranks.first(self._draw)
            batches = list(self._microbatches(sample, largest))
            self.ranks.agree(self._accumulate_share(step, batches))
            optimizer.step()
        if self._unnoised is not None:
            self._unnoised = Unnoised.of_all(self.ranks.tell(self._unnoised))
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _accumulate_share(self, step: int, batches: list[tuple[Tensor, Tensor]]) -> DPFastError | None:
        """Those of the physical batches that this rank gets hold of. What is refused, all ranks are to refuse."""
        try:
            for number in self.ranks.take(len(batches)):
                self._accumulate(step, *batches[number])
        except DPFastError as error:
            return error
        return None

    def _draw(self) -> tuple[Tensor, int]:
        """A Poisson sample, and how many of its examples make a physical batch."""
        return poisson_sample(self.plan.dataset_size, self.plan.sample_rate), self.physical_size.examples

    def _microbatches(self, sample: Tensor, largest: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[m]`` and mask ``[m]`` of physical batches of few sizes; padding has ids beyond the data set."""
        for ids in sample.split(largest):
            size = largest
            while size // 2 >= max(len(ids), largest // 8, 1):
                size //= 2
            padding = torch.arange(size - len(ids)) + self.plan.dataset_size
            yield torch.cat([ids, padding]), torch.arange(size) < len(ids)

    @functools.cached_property
    def physical_size(self) -> Size:
        """Of a full physical batch: what ``performance`` says, or fits its memory budget; less once memory ran out."""
        expected, most = self.plan.expected_batch_size / self.ranks.size, self.plan.dataset_size
        return self.fitting(usual_size(self.performance, self.augmult, self._numbers_per_example, expected, most))

    def fitting(self, size: Size, *, device: str | None = None) -> Size:
        """The largest physical batch up to ``size`` that is predicted to keep to the memory budget (device: as for
        ``plan_step``); where none does, the smallest, with a warning.
        """
        budget = self.performance.memory_budget
        if budget is None:
            return size
        fitting = largest_fitting(size, lambda smaller: self.plan_step(smaller, device=device).peak <= budget)
        if fitting is None:
            rows = {math.ceil(self.augmult / 2**i) for i in range(self.augmult.bit_length() + 1)}
            peak, fewest = min((self.plan_step(Size(1, few), device=device).peak, few) for few in rows)
            fitting = Size(1, fewest)
            warnings.warn(
                f"memory_budget={budget} is less than what any physical batch is predicted to take: the smallest needs"
                f" {peak:,} bytes (rows of one example at a time: {fewest}), and is taken",
                stacklevel=4,
            )
        return fitting

    def physical_losses(self, size: Size | None = None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """What a physical batch computes: ``losses(model, *examples)``, and examples of zeros in its shapes."""
        size = size or self.physical_size
        device = self.performance.device
        examples = tuple(x.to(device) for x in self.examples.batch(torch.arange(0), size.examples))
        keys = RowKeys(self.seed, torch.arange(size.examples, device=device), 0, self.augmult).part(0, size.rows)
        return lambda model, *examples: self._losses(model, *examples, keys), examples

    def plan_step(self, size: Size | None = None, *, device: str | None = None) -> StepPlan:
        """What a physical batch will cost in time and memory: predicted without running it, on no private data.

        device: instead of the trainer's, one of ``dpfast.kernels.rates.DEVICES``, which need not be here.

        Raises ``CaptureError`` where the objective or the model cannot be planned (``dpfast.clipping.plan_step``).
        """
        size = size or self.physical_size
        losses, examples = self.physical_losses(size)
        return plan_step(
            self.model,
            losses,
            examples,
            augmult=self.augmult,
            performance=self.performance_of(size.examples),
            part=size.rows < self.augmult,
            device=device,
        )

    def performance_of(self, examples: int) -> Performance:
        """Of a physical batch of so many: the ordinary gradient of one example alone is the cheapest form."""
        alone = examples == 1 and self.performance.form == "auto"
        return replace(self.performance, form="example") if alone else self.performance

    def _accumulate(self, step: int, ids: Tensor, mask: Tensor) -> None:
        """Add the clipped sum of a physical batch to ``p.grad``.

        Dropout masks, and what a data set draws to transform its examples, belong to places in a batch, so they are
        drawn anew, from the system: numbers known beforehand would change with an example's neighbours, and one example
        could move the share of all others.
        """
        device = self.performance.device
        with seeded(_unknown_seed(), device):
            examples = [x.to(device) for x in self.examples.batch(ids[mask], len(ids))]
        self._add(step, Batch(ids.to(device), mask.to(device), examples, _unknown_seed()))

    def _add(self, step: int, batch: Batch) -> None:
        """The same; a batch for which memory runs out is run again in halves, with the same random numbers."""
        if len(batch.ids) > self.physical_size.examples:  # found out with the batch before, another half of one
            for part in batch.split(self.physical_size.examples):
                self._add(step, part)
            return
        writes = self.clipper.writes
        try:
            self._run(step, batch)
            return
        except Exception as error:
            if not is_out_of_memory(error) or self.clipper.writes != writes:  # run again, it would count twice
                raise
        # Outside of ``except``, where the error and its frames are gone, and with them the tensors they held.
        smaller = Size(len(batch.ids), self.physical_size.rows).half()
        if smaller is None:
            raise ConfigError("one row of one example does not fit into memory: train a smaller model, or elsewhere")
        self.physical_size = smaller
        self._add(step, batch)

    def _run(self, step: int, batch: Batch) -> None:
        """All rows at once, or those of one example in several passes, of which padding alone needs none."""
        size = self.physical_size.rows if len(batch.ids) == 1 else self.augmult
        if size < self.augmult and not batch.mask.any():
            return
        keys = RowKeys(self.seed, batch.ids, step, self.augmult)
        passes: list[Tensor] = []
        self.clipper.one_by_one = self.performance_of(len(batch.ids)).form == "example"
        with self.clipper:
            for first in range(0, self.augmult, size):
                with seeded(batch.seed_of(first), self.performance.device):
                    losses = self._losses(self.model, *batch.examples, keys.part(first, size))
                    if size == self.augmult:
                        result = self.clipper.backward(losses, example_mask=batch.mask)
                    else:
                        result = self.clipper.backward(losses, more=first + size < self.augmult)
                    if self._unnoised is not None:
                        passes.append(losses.detach())
        if self._unnoised is not None:  # after the last pass: a batch for which memory runs out is run again whole
            self._unnoised.add(passes, result.norms, result.clip_factors, batch.mask)

    def _losses(self, model: nn.Module, *arguments: Any) -> Tensor:
        """The objective's, in the dtype that ``performance`` says."""
        low, kind = self.performance.dtype == "bfloat16", torch.device(self.performance.device).type
        with torch.autocast(kind, torch.bfloat16) if low else nullcontext():
            return self.objective(model, *arguments)

    def _show_objective(self, *, seed: int | None = None) -> None:
        """On a few examples, with no more rows than a physical batch has. seed: as ``show_objective`` has it."""
        if len(self.examples) < 2:
            return
        with gathered(self.model):
            self._show_objective_whole(seed)

    def _show_objective_whole(self, seed: int | None) -> None:
        device, size = self.performance.device, self.physical_size
        ids = self.examples.unlike(PROBED_EXAMPLES)
        examples = [x.to(device) for x in self.examples.batch(ids, len(ids))]
        keys = RowKeys(self.seed, torch.arange(len(ids), device=device), 0, self.augmult)
        rows = max(1, size.examples * size.rows // len(ids))
        show_objective(
            self._losses, self.model, examples, keys.part(0, rows), self.clipper.parameters.values(), seed=seed
        )

    # Interruption

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.inner_optimizer}
        return parts if self.ema is None else {**parts, "averaged model": self.ema}

    def _settings(self) -> dict[str, Any]:
        """What must not change between the parts of one training, beside the plan."""
        name, rule = type(self.inner_optimizer).__name__, str(self.clipper.rule)
        return {"optimizer": name, "augmult": self.augmult, "seed": self.seed, "clipping": rule}

    def _save(self, step: int) -> None:
        """By rank 0, with whole tensors."""
        if self.state_dir is None:
            return
        path = self.state_dir / "checkpoint"
        state = {
            "parts": {
                name: full_state(part.state_dict(), keep=self.ranks.leads) for name, part in self._parts().items()
            },
            "step": step,
            "lost_steps": self.lost_steps,
            "settings": self._settings(),
        }
        self.ranks.first(
            lambda: checkpoint.save(path, state, kind="private training", fingerprint=self.plan.fingerprint())
        )

    def _resume(self, charged: int) -> None:
        """Load the last checkpoint; steps charged after it are spent and lost."""
        if self.state_dir is None:
            return  # the model in memory is where the ledger in memory is
        path = self.state_dir / "checkpoint"
        if not charged and not self.ranks.first(path.exists):
            self._save(0)  # from now on a missing checkpoint is a lost one
        if not self.ranks.first(path.exists):
            raise CheckpointError(
                f"{charged} steps are charged to the ledger in {self.state_dir}, and the checkpoint is gone: what they"
                f" trained is lost. Restore it, or {_ANEW}"
            )
        content = self.ranks.first(lambda: checkpoint.read(path))  # other machines may not see it
        state = checkpoint.load(path, kind="private training", fingerprint=self.plan.fingerprint(), content=content)
        saved, lost = state.get("step", -1), state.get("lost_steps", -1)
        whole = type(saved) is int and type(lost) is int and isinstance(state.get("parts"), dict)
        if not whole or not 0 <= lost <= saved:
            raise CheckpointError(
                f"checkpoint {path}: it holds {', '.join(map(str, state))}, no training; it is damaged. Restore a copy"
                f" of the whole folder from after its last step, or {_ANEW}"
            )
        if saved > charged:
            raise PrivacyError(
                f"the checkpoint is at step {saved}, the ledger at {charged}: the ledger was cut or replaced. Restore"
                f" the ledger that belongs to the checkpoint, or {_ANEW}"
            )
        if state.get("settings") != self._settings():
            raise CheckpointError(
                f"the training in {self.state_dir} was begun with {state.get('settings')}, and goes on with"
                f" {self._settings()}: give what it was begun with, or {_ANEW}"
            )
        self._load(state["parts"], tried=saved > 0)
        self.lost_steps = lost + charged - saved
        if charged:
            self.progress(charged, self.plan.steps, self._message())

    def _load(self, parts: dict[str, Any], *, tried: bool) -> None:
        try:
            if parts.keys() != self._parts().keys():
                raise ValueError(f"it holds {', '.join(map(str, parts))}, this training has {', '.join(self._parts())}")
            for name, part in self._parts().items():
                load_full_state(part, parts[name])
            if tried and not is_sharded(self.model):
                self._try_optimizer()
        except Exception as error:  # each part raises what it does
            raise CheckpointError(
                f"the checkpoint in {self.state_dir} is of another model, optimizer or ema_decay: give those it was"
                f" made with, or {_ANEW} ({_brief(error)})"
            ) from error

    def _try_optimizer(self) -> None:
        """A step of a copy, which has no hooks: an optimizer looks into its state when it is used, and by then a step
        would be charged. Of torch's alone: copies of others lack what they keep elsewhere.
        """
        if not type(self.inner_optimizer).__module__.startswith("torch.optim."):
            return
        tried = copy.deepcopy(self.inner_optimizer)
        for p in (p for group in tried.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        tried.step()

    def _message(self) -> str:
        lost = f" ({self.lost_steps} charged steps lost to interruptions)" if self.lost_steps else ""
        return f"private training{lost}"

    def _unnoised_message(self) -> str:
        return "" if self._unnoised is None else f"{self._unnoised.message()}; "


def _brief(error: Exception, lines: int = 3) -> str:
    """The first lines of what torch says, which names every parameter."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) + (f" and {len(said) - lines} lines more" if len(said) > lines else "")
