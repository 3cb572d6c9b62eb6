"""What notices a broken DP-SGD: each catcher raises AssertionError where dpfast does not do what it promises.

They know nothing of the bugs that ``mutants`` plants: what they look at is what comes out of a step, a training or a
ledger. Private randomness is injected, so that a sound dpfast never fails here by chance.
"""

import dataclasses
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import checks
from dpfast import DPOptimizer, DPTrainer, GhostClipper, Performance, Plan
from dpfast.audit.canaries import audit, observe
from dpfast.errors import BudgetExhausted, CaptureError, ConfigError, PrivacyError
from dpfast.privacy import Ledger, choice_release, noised_choice, read_ledger
from dpfast.testing import assert_sensitivity, injected_entropy

C, K, SIGMA = 0.3, 2, 2.0
FORMS = ("auto", "gram", "direct", "materialise")
SEED = 12  # by which examples 5 and 6 of a list are drawn at a rate of one half, and of the others one


# Clipped sums


class Zoo(nn.Module):
    """Every kind of layer that somebody's norms were wrong for; each one's output counts, lest its gradient vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.conv = nn.Conv2d(6, 6, 3)  # of activations that lie channels last
        self.norm = nn.GroupNorm(2, 6)
        self.wide = nn.Linear(3, 4)  # of [N, 6, 3, 3]
        self.tokens = nn.Linear(4, 4)  # of [N, 18, 4]
        self.table = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.grouped(images).to(memory_format=torch.channels_last)
        seen = [x, x := self.conv(x), x := self.norm(x), x := self.wide(x), x := self.tokens(x.flatten(1, 2))]
        x = self.twice(self.twice(x + self.table(labels).unsqueeze(1)).tanh())
        return torch.cat([part.flatten(1) for part in (*seen, x)], 1)


class Cancelling(nn.Module):
    """A linear map whose positions nearly cancel each other's gradients: a Gram of it is all rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.tensor([1e3, -1e3]).repeat(8).unsqueeze(1)


class Length(nn.Module):
    """Whose losses are finite where their gradients are not: at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum(1, keepdim=True).sqrt()


Case = tuple[nn.Module, tuple[Tensor, ...]]  # a model, and examples [B, K, ...]


def zoo() -> Case:
    torch.manual_seed(0)
    return Zoo(), (torch.randn(5, K, 4, 7, 7), torch.randint(0, 5, (5, K)))


def cancelling() -> Case:
    """Beside one whose positions do not cancel, and which moves by C."""
    torch.manual_seed(0)
    alike = torch.randn(3, K, 1, 64).expand(3, K, 16, 64)
    return Cancelling(), (torch.cat([alike + 1e-5 * torch.randn(3, K, 16, 64), torch.randn(1, K, 16, 64)]),)


def undefined() -> Case:
    torch.manual_seed(0)
    return Length(), (torch.cat([torch.randn(3, K, 3), torch.zeros(1, K, 3)]),)


def rows(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.flatten(0, 1) for part in examples)


def total(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return model(*inputs).flatten(1).sum(1)


def sensitivity() -> None:
    """No example moves a sum of two physical batches by more than C, in whatever form."""
    cases = ((zoo, checks.losses, 1e-5), (cancelling, total, 5e-3), (undefined, total, 1e-5))  # 0.5% is a Gram's
    for make, losses, tolerance in cases:
        model, data = make()
        for form in FORMS:
            clipper = GhostClipper(model, max_grad_norm=1e-2, augmult=K, performance=Performance(form=form))

            def step(examples: tuple[Tensor, ...], model=model, losses=losses, clipper=clipper) -> None:
                for some in zip(*(part.split(3) for part in examples), strict=True):
                    with clipper:
                        clipper.backward(losses(model, rows(some)))

            try:
                assert_sensitivity(step, data, promised=1e-2, model=model, neighbors=4, tolerance=tolerance)
            except ConfigError as error:
                raise AssertionError("two results of the same data") from error


def definition() -> None:
    """Norms and sums are those of a loop over examples in float64."""
    model, data = zoo()
    checks.check(model, rows(data), augmult=K, forms=FORMS)


# Whole steps


class Pair(nn.Module):
    """Two weights of one shape, of which only one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def objective(model: nn.Module, images: Tensor, keys) -> Tensor:
    views = images.repeat_interleave(keys.augmult, 0) + keys.normal(*images.shape[1:], stream="noise")
    return checks.losses(model, (views,))


def plan(**changes) -> Plan:
    settings = {"steps": 1, "max_grad_norm": C, "target_delta": 1e-2, "noise_multiplier": SIGMA}
    return Plan(**{**settings, **changes})


class Killed(Exception):
    pass


def training(
    examples: list[Tensor], plan: Plan, *, sums: list[dict[str, Tensor]], killed_at: int = 0, **options
) -> DPTrainer:
    """Fit a model; what the inner optimizer is given goes to ``sums``, as noised sums by parameter."""
    torch.manual_seed(0)
    model = options.pop("model", None) or nn.Linear(48, 8)

    def seen(optimizer: torch.optim.Optimizer, *_) -> None:
        sums.append({name: p.grad.clone() * plan.expected_batch_size for name, p in model.named_parameters()})
        if len(sums) == killed_at:
            raise Killed

    def sgd(parameters) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        made.register_step_pre_hook(seen)
        return made

    settings = {"objective": objective, "optimizer": sgd, "augmult": K}
    trainer = DPTrainer(model, examples, plan, **{**settings, **options})
    trainer.fit()
    return trainer


def private_examples(count: int) -> list[Tensor]:
    return list(torch.randn(count, 48, generator=torch.Generator().manual_seed(0)))


def whole_step() -> None:
    """Sampling, clipping, noise and division together: the noised sum moves by C at most, also when an example that is
    not a number comes."""

    def step(examples: list[Tensor]) -> dict[str, Tensor]:
        sums: list[dict[str, Tensor]] = []
        count = len(examples)
        training(examples, plan(dataset_size=count, expected_batch_size=0.5 * count), sums=sums)
        return sums[0]

    undefined = [torch.full((48,), math.nan)]
    assert_sensitivity(step, private_examples(6), promised=C, neighbors=2, added=undefined, tolerance=1e-4, seed=SEED)


def canaries() -> None:
    """Nothing that an attacker sees of a training with canaries refutes what is said of it."""
    torch.manual_seed(0)
    data = private_examples(20)
    with injected_entropy(0):
        seen = observe(
            nn.Linear(48, 8),
            data,
            plan(dataset_size=20, expected_batch_size=10, steps=24),
            objective=objective,
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            augmult=K,
            canaries=200,
            background=4,
            performance=Performance(microbatch=64),
        )
    wrong = [finding for finding in audit(seen).findings if not finding.sound]
    assert not wrong, wrong


def noise() -> None:
    """Steps without an example, twice after the same seeds: standard normal numbers of the planned scale in every step
    and parameter, all of them fresh."""
    drawn: list[Tensor] = []
    nobody = plan(dataset_size=4, expected_batch_size=1e-6, steps=3)
    with injected_entropy(0), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no loss depends on idle.weight")
        for _ in range(2):
            sums: list[dict[str, Tensor]] = []
            try:
                training(private_examples(4), nobody, sums=sums, model=Pair())
            except Exception as error:
                raise AssertionError("an empty batch ended the training") from error
            assert len(sums) == 3, "a step was left out"
            drawn += [of.flatten() / (SIGMA * C) for step in sums for of in step.values()]
    numbers = torch.stack(drawn).double()
    low, high = stats.chi2.interval(1 - 1e-6, numbers.shape[1])
    assert all(low <= float(of.square().sum()) <= high for of in numbers), "not of the planned scale"
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-4
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 6 / math.sqrt(numbers.shape[1]), "drawn twice"


def last_bits() -> None:
    """Noised sums on a grid are whole multiples of it, whatever the sums were."""
    given = plan(dataset_size=8, expected_batch_size=8, noise="grid")
    model = nn.Linear(48, 8).double()
    _, grid = given.noise_on(sum(p.numel() for p in model.parameters()))
    sums: list[dict[str, Tensor]] = []

    def in_float64(model: nn.Module, images: Tensor, keys) -> Tensor:
        return objective(model, images.double(), keys)

    training(private_examples(8), given, sums=sums, model=model, objective=in_float64)
    for of in sums[0].values():
        assert torch.equal(of / grid, (of / grid).round())


# What is said of it


@functools.cache
def told(rate: float, noise_multiplier: float, steps: int, delta: float, relation: str = "ADD_OR_REMOVE_ONE") -> float:
    """Epsilon, asked of dp-accounting itself."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation[relation], 1e-4)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), steps)
    return float(accountant.get_epsilon(delta))


def agrees(epsilon: float, *of: Any) -> bool:
    return math.isclose(epsilon, told(*of), rel_tol=5e-3)


@contextmanager
def ended_by(error: type[Exception], what: str) -> Iterator[None]:
    """AssertionError unless the block is."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"{what}: let through")


class Failing(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        raise Killed


def accounting() -> None:
    """Epsilon is that of the sampling, the noise, the steps and the delta there are; a step is spent before it is
    taken, and none is taken beyond the plan."""
    given = plan(
        dataset_size=1000,
        expected_batch_size=500,
        steps=3,
        noise_multiplier=None,
        target_epsilon=2.0,
        target_delta=1e-4,
    )
    sigma = given.noise_multiplier
    assert given.epsilon() <= 2.0
    assert agrees(given.epsilon(), 0.5, sigma, 3, 1e-4), "of the plan"
    replaced = dataclasses.replace(given, neighboring="replace", target_epsilon=None)
    assert agrees(replaced.epsilon(1), 0.5, sigma, 1, 1e-4, "REPLACE_ONE"), "of one image exchanged for another"
    beside = dataclasses.replace(
        given, other_releases=[choice_release(settings=4, sigma=2 * sigma)], target_epsilon=None
    )
    assert agrees(beside.epsilon(0), 1.0, sigma, 1, 1e-4), "of other releases"
    model = nn.Linear(2, 2)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), given, clipper := GhostClipper(model, max_grad_norm=C)
    )
    for step in range(1, 4):
        optimizer.step()
        assert optimizer.steps_taken == step, "counted"
        assert agrees(optimizer.ledger.epsilon(), 0.5, sigma, step, 1e-4), "of the ledger"
    with ended_by(BudgetExhausted, "a step beyond the plan"):
        optimizer.step()
    ledger = Ledger(None, given)
    killed = DPOptimizer(Failing(model.parameters(), lr=0.1), given, clipper, ledger)
    with ended_by(Killed, "a kill during an update"):
        killed.step()
    assert ledger.charged_steps == 1, "charged after its update"


def choice() -> None:
    """A choice by private scores is noised as the plan says, and paid for, once."""
    release = choice_release(settings=200, sigma=30.0)
    given = plan(dataset_size=1000, expected_batch_size=500, target_delta=1e-4, other_releases=[release])
    ledger = Ledger(None, given)
    with injected_entropy(0):
        found = noised_choice(torch.zeros(200, dtype=torch.int64), sigma=30.0, ledger=ledger)
    low, high = stats.chi2.interval(1 - 1e-6, 200)
    assert low < sum((count / 30) ** 2 for count in found.noised_counts) < high, "not of the planned scale"
    assert found.index == max(range(200), key=found.noised_counts.__getitem__)
    with ended_by(BudgetExhausted, "a second draw"):
        noised_choice(torch.zeros(200, dtype=torch.int64), sigma=30.0, ledger=ledger)


def resumption() -> None:
    """A training that is killed twice has made as many noised sums as are charged, no two of them with one noise."""
    sums: list[dict[str, Tensor]] = []
    nobody = plan(dataset_size=4, expected_batch_size=1e-6, steps=6)
    with tempfile.TemporaryDirectory() as folder, injected_entropy(0):
        settings = {"sums": sums, "state_dir": folder}
        for killed_at in (2, 5):
            with ended_by(Killed, "a kill"):
                training(private_examples(4), nobody, killed_at=killed_at, **settings)
        trainer = training(private_examples(4), nobody, **settings)
        charged = read_ledger(Path(folder) / "ledger.jsonl").charged_steps
    assert len(sums) == charged == nobody.steps, f"{len(sums)} noised sums, {charged} charged, {nobody.steps} planned"
    assert trainer.lost_steps == 2, "lost steps are not counted"
    numbers = torch.stack([step["weight"].flatten() for step in sums]).double()
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.4, "drawn twice"


def silence() -> None:
    """Neighbouring data sets of one size are trained on with the same words."""
    said = []
    for scale in (1.0, 100.0):
        words = StringIO()
        with injected_entropy(0), redirect_stdout(words):
            data = [*private_examples(5), scale * torch.ones(48)]
            training(data, plan(dataset_size=6, expected_batch_size=3, steps=2), sums=[], progress=print)
        said.append(words.getvalue())
    assert said[0] == said[1], said


# What is refused


def mixing_layer() -> None:
    norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2))
    clipped(model, lambda x: model(x).square().sum(1))


def mixing_losses() -> None:
    model = nn.Linear(4, 2)

    def losses(x: Tensor) -> Tensor:
        own = model(x).square().sum(1)
        return own * own.mean()

    clipped(model, losses)


def clipped(model: nn.Module, losses: Callable[[Tensor], Tensor]) -> None:
    clipper = GhostClipper(model, max_grad_norm=C)
    with clipper:
        clipper.backward(losses(torch.randn(4, 4)))


def divided_objective() -> None:
    def divided(model: nn.Module, images: Tensor, keys) -> Tensor:
        return objective(model, images, keys) / len(images)

    training(private_examples(8), plan(dataset_size=8, expected_batch_size=8), sums=[], objective=divided)


def standardised_objective() -> None:
    def standardised(model: nn.Module, images: Tensor, keys) -> Tensor:
        return objective(model, (images - images.mean(0)) / images.std(0), keys)

    training(private_examples(8), plan(dataset_size=8, expected_batch_size=8), sums=[], objective=standardised)


def unclipped_gradient() -> None:
    model = nn.Linear(4, 2)
    optimizer = stepping(model)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()


def moved_parameters() -> None:
    model = nn.Linear(4, 2)
    optimizer = stepping(model)
    model.weight = nn.Parameter(model.weight.detach().clone())
    optimizer.step()


def other_clip_norm() -> None:
    model = nn.Linear(4, 2)
    stepping(model, max_grad_norm=10 * C)


def stepping(model: nn.Module, max_grad_norm: float = C) -> DPOptimizer:
    clipper = GhostClipper(model, max_grad_norm=max_grad_norm)
    given = plan(dataset_size=8, expected_batch_size=8)
    return DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), given, clipper)


def refusals() -> None:
    """What cannot be clipped, or is not what was planned, is refused."""
    for error, attempts in (
        (CaptureError, (mixing_layer, mixing_losses, divided_objective, standardised_objective)),
        (PrivacyError, (unclipped_gradient, moved_parameters, other_clip_norm)),
    ):
        for attempt in attempts:
            with ended_by(error, attempt.__name__.replace("_", " ")):
                attempt()
