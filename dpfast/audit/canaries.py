"""One private training with canaries in it: what an attacker who sees every noised sum can tell of them.

A canary is an example whose gradient is one coordinate of a weight of its own, steep enough to be clipped and
orthogonal to all others: the easiest to find there is. Half of them, by a fair coin each, are in the data set. They go
through the very training that is audited: its Poisson sampling, clipping, sums, noise, update and ledger.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.data.examples import Dataset, Examples
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError
from dpfast.objective import Objective
from dpfast.privacy import Plan
from dpfast.privacy.bounds import LowerBound, one_run_bound, two_worlds_bound
from dpfast.trainer import DPTrainer, OptimizerFactory

_STEEP = 1e3  # a canary's gradient in clip norms
_RARE = 1e-3  # how often a sound run looks wrong, by each finding
_FEW = 5.0  # draws that are expected, below which their spread is not judged: its distribution is not near enough


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the attacker saw. sums: ``[steps, canaries]``, each canary's coordinate of the noised sums, in clip norms.
    plan: of the training. The truth: included ``[canaries]``, and drawn ``[steps, canaries]``, those that the objective
    was given in a step.
    """

    plan: Plan
    sums: Tensor
    included: Tensor
    drawn: Tensor


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``seen`` beside the limits within which it lies in a sound training; 0 and infinity are none."""

    name: str
    seen: float
    low: float
    high: float

    @property
    def sound(self) -> bool:
        """Whether it lies within."""
        return self.low <= self.seen <= self.high

    @property
    def limits(self) -> str:
        """In words."""
        if self.low <= 0:
            return f"at most {self.high:.3f}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:.3f} to {self.high:.3f}"


@dataclass(frozen=True, kw_only=True)
class CanaryAudit:
    """step, training: lower bounds of one step and of all; step_epsilon, training_epsilon: the accountant's. noise: how
    that of canaries that were not there looked. sampling: how often the others were drawn, and what they added then.
    findings: all of these.
    """

    step: LowerBound
    step_epsilon: float
    training: LowerBound
    training_epsilon: float
    noise: tuple[Finding, ...] = field(default=())
    sampling: tuple[Finding, ...] = field(default=())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that was held against a limit."""
        bounds = (
            Finding(name="epsilon of one step, at least", seen=self.step.epsilon, low=0, high=self.step_epsilon),
            Finding(
                name="epsilon of the training, at least", seen=self.training.epsilon, low=0, high=self.training_epsilon
            ),
        )
        return (*bounds, *self.noise, *self.sampling)


def observe(
    model: nn.Module,
    dataset: Dataset,
    plan: Plan,
    *,
    objective: Objective,
    optimizer: OptimizerFactory,
    canaries: int = 1000,
    background: int = 200,
    seed: int = 0,
    **options: Any,
) -> Observed:
    """Train ``model`` (which is changed) by ``DPTrainer`` on canaries and ``background`` examples of the data set.

    plan: its sample rate, steps, clip norm, noise and delta are kept, its number of examples is that of the examples
    there are. objective, optimizer and further options (augmult, performance, progress, ...): as ``DPTrainer`` takes
    them. seed: of the choice of background and of which canaries are there, beside what ``DPTrainer`` does with it.

    Raises ConfigError for fewer than 20 canaries, or a plan without noise.
    """
    if canaries < 20 or not plan.is_private:
        raise ConfigError(f"observe: {canaries} canaries; expected 20 or more, and a plan with noise")
    coins = torch.Generator().manual_seed(seed)
    included = torch.rand(canaries, generator=coins) < 0.5
    kept = torch.randperm(len(dataset), generator=coins)[:background]
    marked = _Marked(dataset, kept, included)
    audited = _with_size(plan, len(marked))
    marks, seen = _Marks(model, canaries), []

    def watched(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        made = optimizer(parameters)
        made.register_step_pre_hook(lambda *_: seen.append(_coordinates(marks.marks, canaries)))
        return made

    watching = _CanaryObjective(objective, canaries, _STEEP * plan.max_grad_norm, examples=len(marked))
    trainer = DPTrainer(
        marks.train(model.training),
        marked,
        audited,
        objective=watching,
        optimizer=watched,
        seed=seed,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="it was not shown that the model")  # model and marks, one by one
        trainer.fit()
    return Observed(
        plan=audited,
        sums=torch.stack(seen) * audited.expected_batch_size / plan.max_grad_norm,
        included=included,
        drawn=watching.drawn(len(seen)),
    )


def audit(observed: Observed, *, confidence: float = 0.95) -> CanaryAudit:
    """What was seen, held against the plan. Neighbours differ by an example more or less, whatever the plan says."""
    plan, sums, included = observed.plan, observed.sums.double(), observed.included
    absent, present = sums[:, ~included], sums[:, included]
    sigma, rate = plan.noise_multiplier, plan.sample_rate
    evidence = torch.log1p(rate * torch.expm1((sums - 0.5) / sigma**2)).sum(0)  # likelihood with it over that without
    step = two_worlds_bound(
        absent.flatten().tolist(), present.flatten().tolist(), delta=plan.target_delta, confidence=confidence
    )
    training = one_run_bound(evidence.tolist(), included.tolist(), delta=plan.target_delta, confidence=confidence)
    return CanaryAudit(
        step=step,
        step_epsilon=plan.epsilon(1),
        training=training,
        training_epsilon=plan.epsilon(),
        noise=tuple(_noise_findings(absent / sigma)),
        sampling=tuple(_sampling_findings(observed.drawn[:, included], present, rate, sigma)),
    )


def _noise_findings(noise: Tensor) -> Iterable[Finding]:
    """Of ``[steps, canaries]`` that should be independent standard normal numbers."""
    from scipy import stats

    count, (steps, canaries) = noise.numel(), noise.shape
    low, high = (math.sqrt(stats.chi2.ppf(p, count) / count) for p in (_RARE / 2, 1 - _RARE / 2))
    yield Finding(
        name="standard deviation of the noise, over the planned",
        seen=float(noise.square().mean().sqrt()),
        low=low,
        high=high,
    )
    distance = stats.kstest(noise.flatten().numpy(), "norm")
    yield Finding(
        name="chance of such numbers if they are normal", seen=float(distance.pvalue), low=_RARE, high=math.inf
    )
    if steps > 1:
        pairs = steps * (steps - 1) // 2
        alike = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
        limit = stats.norm.isf(_RARE / 2 / pairs) / math.sqrt(canaries)
        yield Finding(
            name="largest correlation between the noise of two steps", seen=float(alike), low=0.0, high=float(limit)
        )


def _sampling_findings(drawn: Tensor, sums: Tensor, rate: float, sigma: float) -> Iterable[Finding]:
    """Of ``[steps, canaries]`` that should be drawn independently of each other at ``rate``, and weigh 1 then."""
    from scipy import stats

    count = int(drawn.sum())
    low, high = (stats.binom.ppf(p, drawn.numel(), rate) / (rate * drawn.numel()) for p in (_RARE / 2, 1 - _RARE / 2))
    yield Finding(
        name="canaries that were drawn, over the planned", seen=count / (rate * drawn.numel()), low=low, high=high
    )
    for of, numbers, trials in (
        ("a step drew", drawn.sum(1), drawn.shape[1]),
        ("a canary was drawn", drawn.sum(0), drawn.shape[0]),
    ):
        variance = trials * rate * (1 - rate)
        if min(variance, trials * rate) < _FEW:
            continue
        # A gamma distribution of the same mean and variance: chi-square, but for the kurtosis of binomial numbers.
        each = 2 + (1 - 6 * rate * (1 - rate)) / variance
        limits = (
            stats.gamma.ppf(p, len(numbers) / each, scale=each / len(numbers)) for p in (_RARE / 2, 1 - _RARE / 2)
        )
        low, high = map(float, limits)
        seen = float((numbers - trials * rate).square().mean()) / variance
        yield Finding(name=f"spread of how often {of}, over the planned", seen=seen, low=low, high=high)
    if count:
        most = 1 + stats.norm.isf(_RARE) * sigma / math.sqrt(count)
        yield Finding(
            name="what a drawn canary adds, in clip norms", seen=float(sums[drawn].mean()), low=-math.inf, high=most
        )


def _with_size(plan: Plan, size: int) -> Plan:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_delta=")  # nothing of this training is released
        return replace(
            plan,
            dataset_size=size,
            expected_batch_size=plan.sample_rate * size,
            target_epsilon=None,
            other_releases=(),
            neighboring="add_remove",
        )


def _coordinates(marks: nn.Embedding, canaries: int) -> Tensor:
    assert marks.weight.grad is not None
    return marks.weight.grad[:canaries, 0].detach().cpu().clone()


class _Marks(nn.Module):
    """The audited model, and a weight with one coordinate for each canary and one for everybody else."""

    def __init__(self, model: nn.Module, canaries: int) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.marks = nn.Embedding(canaries + 1, 1, device=device)
        nn.init.zeros_(self.marks.weight)

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class _CanaryObjective:
    """The audited objective, and for a canary ``steep`` times its coordinate instead. examples: of the data set, beyond
    whose numbers is padding.
    """

    def __init__(self, objective: Objective, canaries: int, steep: float, *, examples: int) -> None:
        self._objective, self._canaries, self._steep, self._examples = objective, canaries, steep, examples
        self._given: list[tuple[int, Tensor]] = []

    def drawn(self, steps: int) -> Tensor:
        """``[steps, canaries]``: whether a canary was given in a step."""
        found = torch.zeros(steps, self._canaries, dtype=torch.bool)
        for step, which in self._given:
            found[step - 1, which.cpu()] = True
        return found

    def __call__(self, model: nn.Module, /, *examples: Any) -> Tensor:
        *inputs, which, keys = examples
        assert isinstance(model, _Marks)
        assert isinstance(keys, RowKeys)
        losses = self._objective(model.model, *inputs, keys)
        if keys.step:  # 0 is a probe before training
            self._given.append((keys.step, which[(keys.ids < self._examples) & (which < self._canaries)]))
        rows = which.repeat_interleave(keys.augmult)
        own = self._steep * model.marks(rows).squeeze(1)
        return torch.where(rows < self._canaries, own, losses)


class _Marked:
    """Some examples of a data set, and the canaries that are there: each as the first of them, with its number."""

    def __init__(self, dataset: Dataset, kept: Tensor, included: Tensor) -> None:
        self._examples = Examples(dataset)
        there = included.nonzero().flatten()
        self._sources = torch.cat([kept, kept[:1].expand(len(there))])
        self._marks = torch.cat([torch.full((len(kept),), len(included)), there])

    def __len__(self) -> int:
        return len(self._marks)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return (*(part[0] for part in self._examples.batch(self._sources[i : i + 1], 1)), self._marks[i])
