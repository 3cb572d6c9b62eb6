"""DPTrainer: what it computes, what it refuses, how it goes on after an interruption."""

import copy
import dataclasses
import itertools
import math
import random
import re
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from dpfast import DPOptimizer, DPTrainer, Performance, Plan
from dpfast.data import ImageSet
from dpfast.errors import CaptureError, CheckpointError, ConfigError, DataError, PrivacyError
from dpfast.measure import peak_storages
from dpfast.performance import Form
from dpfast.physical import Batch, Size, usual_size
from dpfast.privacy import read_ledger
from dpfast.testing import injected_entropy

EXAMPLES, K = 12, 3


def images(count: int = EXAMPLES) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 3, ("a", "b", "c"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))


def objective(model, pixels, labels, keys):
    """Rows differ by keyed noise, so that K matters."""
    rows = pixels.float().div(255).repeat_interleave(keys.augmult, 0) + 0.1 * keys.normal(1, 6, 6, stream="noise")
    return nn.functional.cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")


def plan(**changes) -> Plan:
    settings = {
        "dataset_size": EXAMPLES,
        "expected_batch_size": 6,
        "max_grad_norm": 0.5,
        "steps": 6,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
    }
    return Plan(**{**settings, **changes})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trainer(model=None, *, plan=plan(), state_dir=None, **options) -> DPTrainer:
    settings = {"objective": objective, "augmult": K, "ema_decay": 0.5, "optimizer": sgd}
    return DPTrainer(
        model or network(),
        images(plan.dataset_size),
        plan,
        state_dir=state_dir,
        **{**settings, **options},
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


NO_NOISE = {"expected_batch_size": EXAMPLES, "noise_multiplier": None, "target_epsilon": math.inf, "max_grad_norm": 1e6}


@pytest.mark.parametrize("microbatch", [None, 1, 5])
@pytest.mark.parametrize("form", ["auto", "example"])
def test_without_noise_and_clipping_it_is_ordinary_training(form, microbatch) -> None:
    """Full batches, no noise, a huge clip norm: plain gradient descent on the mean over images and augmentations."""
    from dpfast.data.keyed import RowKeys

    private = network()
    ordinary = copy.deepcopy(private)
    performance = Performance(form=form, microbatch=microbatch)
    trainer(private, plan=plan(**NO_NOISE), performance=performance, seed=7).fit()
    data, optimizer = images(), torch.optim.SGD(ordinary.parameters(), lr=0.1)
    for step in range(1, 7):
        optimizer.zero_grad()
        objective(ordinary, data.images, data.labels, RowKeys(7, torch.arange(EXAMPLES), step, K)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(private), weights(ordinary), rtol=1e-4, atol=1e-6)


OTHER = {
    "form": [f for f in get_args(Form) if f != "auto"],
    "microbatch": [1, 5, 100],
    "memory_budget": [4_200, 30_000],  # two of three rows of an example at a time, a few examples
    "device": [f"cuda:{i}" for i in range(torch.cuda.device_count())],
    "dtype": ["bfloat16"],
    "compile": [True],
}


def test_every_performance_setting_is_looked_at() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Performance)}


# torch's own, at the first import of inductor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OTHER.items() for value in values])
def test_no_performance_setting_moves_the_clipped_sum(name, value, dtype, monkeypatch) -> None:
    """What may not move epsilon moves nothing beyond a few roundings of the numbers that are computed with."""
    monkeypatch.setattr("dpfast.clipping.private.COMPILER", "aot_eager")  # inductor takes long to compile

    def in_dtype(model, pixels, labels, keys):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return objective(model, pixels, labels, keys)

    def sums(max_grad_norm: float, **settings) -> list[torch.Tensor]:
        """Of a step that shows that examples stay apart, and of one like most."""
        t = trainer(plan=plan(max_grad_norm=max_grad_norm), objective=in_dtype, performance=Performance(**settings))
        found = []
        for _ in range(2):
            t.clipper.zero_grad()
            for ids, mask in t._microbatches(torch.arange(EXAMPLES), t.physical_size.examples):
                t._accumulate(1, ids, mask)
            found.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]).cpu().double())
        return found

    usual, *_ = sums(0.5)
    assert not torch.allclose(usual, sums(1e6)[0], rtol=0.1), "nothing is clipped"
    coarser = torch.bfloat16 if name == "dtype" else dtype
    for found in sums(0.5, **{name: value}):
        assert (found - usual).norm() <= 4 * torch.finfo(coarser).eps * usual.norm()


def test_the_objective_is_computed_in_the_dtype() -> None:
    seen = []

    def watched(model, pixels, labels, keys):
        seen.append(model(pixels.repeat_interleave(keys.augmult, 0).float()).dtype)
        return objective(model, pixels, labels, keys)

    trainer(objective=watched, performance=Performance(dtype="bfloat16")).fit()
    assert set(seen) == {torch.bfloat16}
    with pytest.raises(ConfigError, match="dtype='float16'"):
        Performance(dtype="float16")


def test_no_step_holds_more_than_the_memory_budget() -> None:
    """Measured where it shows that examples stay apart and where not, of whole examples and of some rows of one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU()]
    model, sizes = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3)), set()
    for budget in (1_700_000, 900_000, 150_000):
        t = trainer(model, performance=Performance(memory_budget=budget), augmult=16)
        ids = torch.arange(t.physical_size.examples)
        sizes.add((len(ids), t.physical_size.rows))
        for _ in range(3):
            t.clipper.zero_grad()
            peak = peak_storages(lambda t=t, ids=ids: t._accumulate(1, ids, torch.ones(len(ids), dtype=torch.bool)))
            assert 0.5 * budget < peak <= 1.1 * budget
    assert sizes == {(6, 16), (3, 16), (1, 8)}


def test_the_memory_budget_sizes_physical_batches() -> None:
    """Fewer examples, then fewer rows of one, as far as the predicted peak says."""
    sizes = []
    for budget in (None, 30_000, 15_000, 4_200):
        t = trainer(performance=Performance(memory_budget=budget))
        sizes.append((t.physical_size.examples, t.physical_size.rows))
        if budget is not None:
            assert t.plan_step().peak <= budget
    assert sizes[0] == (6, K)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1][0] == 1
    assert sizes[-1][1] < K
    t = trainer(performance=Performance(memory_budget=1))
    with pytest.warns(UserWarning, match=r"memory_budget=1 is less than .* the smallest needs [\d,]+ bytes"):
        smallest = t.physical_size
    assert smallest.examples == 1
    assert t.plan_step(smallest).peak == min(t.plan_step(Size(1, rows)).peak for rows in (1, 2, K))


@pytest.mark.parametrize("fits", [1, 2, 4, 9])
def test_what_does_not_fit_is_run_again_in_halves(fits) -> None:
    """Only the physical batch that failed, each example once, and the result is the same."""
    whole, most = plan(**{**NO_NOISE, "max_grad_norm": 0.5}), {"rows": 10**9}
    ran: list[tuple[int, int]] = []

    def limited(model, pixels, labels, keys):
        if keys.rows > most["rows"]:
            raise torch.OutOfMemoryError("none left")
        losses = objective(model, pixels, labels, keys)
        if keys.step:
            ran.extend(zip(keys.ids.repeat_interleave(keys.augmult).tolist(), keys.views.tolist(), strict=True))
        return losses

    usual = trainer(plan=whole)
    usual.fit()
    most["rows"] = fits
    halved = trainer(plan=whole, objective=limited)
    halved._take(1, DPOptimizer(halved.inner_optimizer, whole, halved.clipper, halved._memory))
    assert sorted(ran) == [(i, v) for i in range(EXAMPLES) for v in range(K)]
    assert halved.physical_size.examples * halved.physical_size.rows <= fits
    for step in range(2, 7):
        halved._take(step, DPOptimizer(halved.inner_optimizer, whole, halved.clipper, halved._memory))
    torch.testing.assert_close(weights(halved.model), weights(usual.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fails", ["in backward, after the sum", "at the end of the block"])
def test_memory_that_runs_out_after_a_sum_was_added(fails, monkeypatch) -> None:
    """Run again in halves, every example of the batch would count twice."""
    t, written = trainer(), []
    name = "_warn" if fails.startswith("in") else "_buffer_problems"
    usual = getattr(t.clipper, name)

    def failing(*arguments, **named):
        if t.clipper.writes:
            written.append(1)
            raise torch.OutOfMemoryError("none left")
        return usual(*arguments, **named)

    monkeypatch.setattr(t.clipper, name, failing)
    with pytest.raises(torch.OutOfMemoryError):
        t._accumulate(1, torch.arange(4), torch.ones(4, dtype=torch.bool))
    assert written == [1]


def test_halves_of_halves_do_not_grow_again() -> None:
    t, attempts = trainer(), []

    def limited(step, batch):
        attempts.append(len(batch.ids))
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("none left")

    t._run = limited
    t._accumulate(1, torch.arange(6), torch.ones(6, dtype=torch.bool))
    assert attempts == [6, 3, 2, 1, 1, 1, 1, 1, 1]
    assert t.physical_size.examples == 1


def test_an_empty_sample_in_passes_says_nothing() -> None:
    """Whether a sample was empty is not to be seen: warnings are errors here."""
    t = trainer(performance=Performance(memory_budget=4_200))
    assert t.physical_size.rows < K
    for ids, mask in t._microbatches(torch.arange(0), t.physical_size.examples):
        t._accumulate(1, ids, mask)
    assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())


def test_a_row_that_does_not_fit_ends_the_training() -> None:
    def never(*_):
        raise torch.OutOfMemoryError("none left")

    t = trainer()
    t.objective = never
    with pytest.raises(ConfigError, match="one row of one example does not fit"):
        t._accumulate(1, torch.arange(EXAMPLES), torch.ones(EXAMPLES, dtype=torch.bool))


def test_dropout_is_drawn_alike_when_run_again_and_apart_in_each_part() -> None:
    whole = Batch(torch.arange(8), torch.arange(8) < 7, [torch.arange(8)], seed=3)
    again = list(whole.split(2))
    assert [part.seed_of(0) for part in again] == [part.seed_of(0) for part in whole.split(2)]
    assert len({part.seed_of(row) for part in again for row in range(3)}) == 3 * len(again)
    assert torch.cat([part.examples[0] for part in again]).tolist() == list(range(8))
    assert [part.ids.tolist() for part in whole.split(1)] == [[i] for i in range(7)]  # not padding alone


def test_a_gpu_takes_more_rows_at_a_time() -> None:
    sizes = [usual_size(Performance(device=name), 4, 3 * 32 * 32, 1e4, 100_000) for name in ("cpu", "cuda", "cuda:1")]
    assert sizes == [Size(5, 4), Size(170, 4), Size(170, 4)]


def test_physical_batches_have_few_sizes_and_each_example_once() -> None:
    t = trainer(plan=plan(dataset_size=100), performance=Performance(microbatch=16))
    for count in range(101):
        sample = torch.randperm(100)[:count].sort().values
        batches = list(t._microbatches(sample, t.physical_size.examples))
        assert {len(ids) for ids, _ in batches} <= {16, 8, 4, 2}
        assert torch.equal(torch.cat([ids[mask] for ids, mask in batches] or [sample]), sample)
        assert all((ids[~mask] >= 100).all() for ids, mask in batches)


def test_a_plain_list_of_tensors_is_a_data_set() -> None:
    class Pairs(list):
        pass

    data = images()
    pairs = Pairs((x, y) for x, y in zip(data.images, data.labels, strict=True))
    t = DPTrainer(network(), pairs, plan(), objective=objective, optimizer=torch.optim.Adam, augmult=K)
    before = weights(t.model)
    t.fit()
    assert not torch.equal(before, weights(t.model))


def test_noise_comes_from_the_system_and_not_from_the_seed() -> None:
    first, second = trainer(seed=0), trainer(seed=0)
    first.fit()
    second.fit()
    assert not torch.equal(weights(first.model), weights(second.model))


def test_empty_batches_are_ordinary_steps(monkeypatch) -> None:
    monkeypatch.setattr("dpfast.trainer.poisson_sample", lambda *_: torch.empty(0, dtype=torch.int64))
    t = trainer()
    before = weights(t.model)
    t.fit()
    assert (weights(t.model) != before).all()  # every parameter got noise


def test_dropout_is_secret() -> None:
    """A mask belongs to a place in the batch: drawn from a public seed, it would tie examples to their neighbours."""

    def with_dropout() -> nn.Module:
        model = network()
        model[2] = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
        return model

    first, second = (trainer(with_dropout(), plan=plan(**NO_NOISE), seed=0) for _ in range(2))
    first.fit()
    second.fit()
    assert not torch.equal(weights(first.model), weights(second.model))


@pytest.mark.parametrize(
    "draw",
    [lambda: int(torch.randint(99, ())), lambda: random.randrange(99), lambda: int(np.random.randint(99))],  # noqa: NPY002
    ids=["torch", "python", "numpy"],
)
def test_transforms_of_the_data_set_are_secret(draw) -> None:
    """As dropout: torchvision's transforms draw from the generators that all share, in the order of the batch."""

    class Shifted:
        def __init__(self):
            self.images, self.drawn = images(), []

        def __len__(self):
            return EXAMPLES

        def __getitem__(self, i):
            self.drawn.append(draw())
            return self.images.images[i].roll(self.drawn[-1]), self.images.labels[i]

    def drawn() -> list[int]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        data = Shifted()
        t = DPTrainer(network(), data, plan(), objective=objective, optimizer=torch.optim.Adam, augmult=K)
        data.drawn.clear()
        t._accumulate(1, torch.arange(EXAMPLES), torch.ones(EXAMPLES, dtype=torch.bool))
        return data.drawn

    assert drawn() != drawn()


def test_an_interrupted_step_leaves_no_sum_behind(monkeypatch) -> None:
    """Its sample is gone: the next step sums a sample of its own, and steps are never taken twice."""
    t = trainer(performance=Performance(microbatch=2))
    calls = []

    def cut(model, *batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return objective(model, *batch)

    t.objective = cut
    with pytest.raises(KeyboardInterrupt):
        t.fit()
    sums = []
    real = t.clipper.backward

    def seen(*args, **options):
        sums.append(t.clipper.parameters["0.weight"].grad)
        return real(*args, **options)

    monkeypatch.setattr(t.clipper, "backward", seen)
    t.fit()
    assert sums[0] is None


def test_fit_called_again_takes_no_step_twice() -> None:
    steps = []
    t = trainer()
    t.progress = lambda step, *_: steps.append(step)
    for _ in range(3):
        t.fit()
    assert steps == [1, 2, 3, 4, 5, 6]


def test_empty_batches_of_any_data_set(monkeypatch) -> None:
    monkeypatch.setattr("dpfast.trainer.poisson_sample", lambda *_: torch.empty(0, dtype=torch.int64))
    data = images()
    pairs = list(zip(data.images, data.labels, strict=True))
    DPTrainer(network(), pairs, plan(), objective=objective, optimizer=torch.optim.Adam, augmult=K).fit()


@pytest.mark.parametrize("folder", [False, True])
def test_a_step_that_was_taken_is_known_when_it_is_interrupted(folder, tmp_path, monkeypatch) -> None:
    step = DPOptimizer.step

    def interrupted(self) -> None:
        step(self)
        if self.steps_taken == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DPOptimizer, "step", interrupted)
    t = trainer(state_dir=tmp_path if folder else None)
    with pytest.raises(KeyboardInterrupt):
        t.fit()
    assert t.charged_steps == t.statement().steps_charged == 2
    assert t.epsilon == t.plan.epsilon(2)


def test_an_optimizer_that_keeps_something_of_its_own_goes_on(tmp_path) -> None:
    class Rescaled(torch.optim.SGD):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, lr=0.1)
            self.rescale = 0.5

        def step(self, closure=None):
            for p in (p for group in self.param_groups for p in group["params"]):
                p.grad.mul_(self.rescale)
            super().step(closure)

    with pytest.raises(Cut):
        trainer(state_dir=tmp_path, optimizer=Rescaled, progress=cut_at(3)).fit()
    trainer(state_dir=tmp_path, optimizer=Rescaled).fit()
    assert read_ledger(tmp_path / "ledger.jsonl").charged_steps == 6


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    t = trainer(network())
    torch.manual_seed(3)
    t.fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rate_warms_up() -> None:
    rates = []
    t = trainer(warmup_steps=4)
    t.progress = lambda *_: rates.append(t.inner_optimizer.param_groups[0]["lr"])
    t.fit()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


class Cut(Exception):
    """Stands for a kill."""


def cut_at(step: int):
    def progress(done: int, total: int, message: str) -> None:
        if done == step:
            raise Cut

    return progress


def test_a_resumed_run_takes_each_step_once(tmp_path) -> None:
    for step in (2, 3, 5):
        with pytest.raises(Cut):
            trainer(state_dir=tmp_path, progress=cut_at(step)).fit()
        assert read_ledger(tmp_path / "ledger.jsonl").charged_steps == step
    last = trainer(state_dir=tmp_path)
    last.fit()
    assert last.lost_steps == 0
    assert read_ledger(tmp_path / "ledger.jsonl").charged_steps == 6
    again = trainer(state_dir=tmp_path)
    again.fit()
    assert torch.equal(weights(again.model), weights(last.model))
    assert torch.equal(weights(again.ema_model), weights(last.ema_model))


def test_a_resumed_run_computes_what_an_uninterrupted_one_does(tmp_path) -> None:
    """Without noise and with full batches nothing is random but what is keyed."""
    whole = trainer(plan=plan(**NO_NOISE))
    whole.fit()
    with pytest.raises(Cut):
        trainer(plan=plan(**NO_NOISE), state_dir=tmp_path, progress=cut_at(3)).fit()
    rest = trainer(plan=plan(**NO_NOISE), state_dir=tmp_path)
    rest.fit()
    torch.testing.assert_close(weights(rest.ema_model), weights(whole.ema_model), rtol=0, atol=0)


def test_a_charged_step_that_was_not_saved_is_lost_and_not_repeated(tmp_path, monkeypatch) -> None:
    t = trainer(state_dir=tmp_path)
    save = DPTrainer._save

    def failing(self, step: int) -> None:
        if step == 0:
            save(self, step)
        if step == 3:
            raise Cut

    monkeypatch.setattr(DPTrainer, "_save", failing)
    with pytest.raises(Cut):
        t.fit()
    monkeypatch.undo()
    messages = []
    rest = trainer(state_dir=tmp_path, progress=lambda *said: messages.append(said))
    rest.fit()
    assert rest.lost_steps == 3
    assert [step for step, _, _ in messages] == [3, 4, 5, 6]
    assert "3 charged steps lost" in messages[0][2]
    assert read_ledger(tmp_path / "ledger.jsonl").charged_steps == 6


def test_a_kill_loses_at_most_two_percent(tmp_path, monkeypatch) -> None:
    # On a machine that is busy, writing takes longer than its allowance.
    monkeypatch.setattr("dpfast.pace.FREE", math.inf)
    long = plan(steps=200, dataset_size=2, expected_batch_size=1)
    saved = []
    t = trainer(plan=long, state_dir=tmp_path)
    t._take = lambda step, optimizer: optimizer.ledger.charge(step)
    save = t._save
    t._save = lambda step: [saved.append(step), save(step)]
    t.fit()
    assert saved[0] == 0
    assert max(b - a for a, b in itertools.pairwise(saved)) <= 0.02 * 200
    assert saved[-1] == 200


def test_a_ledger_that_lies_behind_its_checkpoint(tmp_path) -> None:
    with pytest.raises(Cut):
        trainer(state_dir=tmp_path, progress=cut_at(3)).fit()
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(PrivacyError, match="checkpoint is at step 3, the ledger at 1"):
        trainer(state_dir=tmp_path).fit()


def test_a_checkpoint_of_another_plan(tmp_path) -> None:
    trainer(state_dir=tmp_path).fit()
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match="another run"):
        trainer(state_dir=tmp_path, plan=plan(noise_multiplier=2.0)).fit()


def test_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(PrivacyError, match="12 examples, the plan was made for 13"):
        DPTrainer(network(), images(), plan(dataset_size=13), objective=objective, optimizer=torch.optim.Adam)
    with pytest.raises(ConfigError, match="ema_decay"):
        trainer(ema_decay=1.0)
    assert not list(tmp_path.iterdir())


def test_injected_entropy_makes_a_run_repeatable_and_marks_its_ledger(tmp_path) -> None:
    results = []
    for name in ("a", "b"):
        with injected_entropy(5):
            t = trainer(state_dir=tmp_path / name)
            t.fit()
        results.append(weights(t.model))
    assert torch.equal(*results)
    assert read_ledger(tmp_path / "a" / "ledger.jsonl").test_entropy


def heard(**options) -> tuple[DPTrainer, list[str]]:
    """A trainer that keeps its messages."""
    said: list[str] = []
    return trainer(progress=lambda step, steps, message: said.append(message), **options), said


SAID = (
    r"UNSAFE DEBUG: (\d+) examples, mean loss (\S+), median norm (\S+), largest (\S+), (\d+)% clipped; private training"
)


@pytest.mark.parametrize("runs_out", [False, True])
@pytest.mark.parametrize("settings", [{}, {"microbatch": 5}, {"memory_budget": 4_200}, {"form": "example"}])
def test_unsafe_debug_says_what_plain_autograd_says(settings, runs_out) -> None:
    """Whatever the physical batches, padding and passes. runs_out: of memory, in a second call (of passes, the second
    of an example), so that what has begun is run again.
    """
    from dpfast.data.keyed import RowKeys

    calls = []

    def limited(model, pixels, labels, keys):
        calls.extend([1] * keys.step)
        if runs_out and keys.step and len(calls) == 2:
            raise torch.OutOfMemoryError("none left")
        return objective(model, pixels, labels, keys)

    model, data, norms, losses = network(), images(), [], []
    keys = RowKeys(0, torch.arange(EXAMPLES), 1, K)
    rows = objective(model, data.images, data.labels, keys).view(EXAMPLES, K)
    for own in rows:
        grads = torch.autograd.grad(own.mean(), list(model.parameters()), retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        losses.append(own.mean().detach())
    norms = torch.stack(norms)
    clip = float(norms.sort().values[2:4].mean())  # three of twelve are left as they are
    whole = plan(**NO_NOISE | {"max_grad_norm": clip, "steps": 1})
    t, said = heard(plan=whole, objective=limited, performance=Performance(**settings), unsafe_debug=True)
    with pytest.warns(UserWarning, match="unsafe_debug: .* Epsilon does not cover whoever sees them"):
        t.fit()
    (found,) = said
    examples, loss, median, largest, clipped = map(float, re.fullmatch(SAID, found).groups())
    assert (examples, clipped) == (EXAMPLES, 75)
    for shown, there in ((loss, torch.stack(losses).mean()), (median, norms.median()), (largest, norms.max())):
        assert shown == pytest.approx(float(there), rel=1e-2)


def test_unsafe_debug_of_an_empty_sample() -> None:
    t, said = heard(plan=plan(expected_batch_size=1e-9, steps=1, noise_multiplier=1.0), unsafe_debug=True)
    with pytest.warns(UserWarning, match="unsafe_debug"):
        t.fit()
    assert said == ["UNSAFE DEBUG: 0 examples; private training"]


def test_nothing_is_said_or_marked_without_unsafe_debug(tmp_path) -> None:
    t, said = heard(state_dir=tmp_path)
    t.fit()
    assert said == ["private training"] * 6
    assert t._unnoised is None
    t.statement().write(tmp_path)
    for file in ("ledger.jsonl", "PRIVACY.md", "privacy.json"):
        assert "UNSAFE" not in (tmp_path / file).read_text()
    assert not t.statement().unsafe_debug


def test_unsafe_debug_is_marked_before_it_shows_and_for_good(tmp_path) -> None:
    """Switched on in the middle of a training, and off again."""
    path = tmp_path / "ledger.jsonl"

    def marked() -> list[bool]:
        return ["UNSAFE DEBUG" in line for line in path.read_text().splitlines()]

    def until(last: int, shows: bool):
        def progress(step: int, steps: int, message: str) -> None:
            if message.startswith("UNSAFE DEBUG"):
                assert shows
                assert marked()[step]
            if step == last and message.startswith("UNSAFE DEBUG") == shows:
                raise Cut

        return progress

    with pytest.raises(Cut):
        trainer(state_dir=tmp_path, progress=until(2, shows=False)).fit()
    assert not read_ledger(path).unsafe_debug
    with pytest.raises(Cut), pytest.warns(UserWarning, match="unsafe_debug"):
        trainer(state_dir=tmp_path, progress=until(4, shows=True), unsafe_debug=True).fit()
    last = trainer(state_dir=tmp_path, progress=until(7, shows=False))
    last.fit()
    assert marked() == [False, False, False, True, True, False, False]
    assert read_ledger(path).unsafe_debug
    assert "UNSAFE DEBUG" in last.statement().text().splitlines()[2]


def test_unsafe_debug_is_marked_in_memory_too() -> None:
    t = trainer(unsafe_debug=True)
    with pytest.warns(UserWarning, match="unsafe_debug"):
        t.fit()
    assert t.statement().unsafe_debug


def fit_without(name: str, folder) -> DPTrainer:
    """A trained folder less one file, opened again."""
    trainer(state_dir=folder).fit()
    (folder / name).unlink()
    return trainer(state_dir=folder)


def test_a_checkpoint_that_is_gone(tmp_path) -> None:
    """Not an untrained model that claims to be trained."""
    with pytest.raises(CheckpointError, match=r"6 steps are charged .* the checkpoint is gone"):
        fit_without("checkpoint", tmp_path).fit()


def test_a_ledger_that_is_gone(tmp_path) -> None:
    with pytest.raises(PrivacyError, match="checkpoint is at step 6, the ledger at 0"):
        fit_without("ledger.jsonl", tmp_path).fit()


def bigger() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(128, 3))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"ema_decay": None}, "it holds model, optimizer, averaged model"),
        ({"model": bigger()}, "size mismatch|Missing key"),
        ({"augmult": 1}, "begun with .*'augmult': 3.* goes on with .*'augmult': 1"),
        ({"optimizer": torch.optim.Adam}, "begun with .*'optimizer': 'SGD'.* goes on with .*'Adam'"),
        ({"clipping": "automatic"}, "begun with .*'clipping': 'flat'.* goes on with .*'automatic, stability 0.01'"),
    ],
    ids=["without an average", "another model", "another K", "another optimizer", "another way to clip"],
)
def test_a_checkpoint_of_another_training(options, what, tmp_path) -> None:
    with pytest.raises(Cut):
        trainer(state_dir=tmp_path, progress=cut_at(3)).fit()
    other = trainer(state_dir=tmp_path, **options)
    with pytest.raises(CheckpointError, match=what) as caught:
        other.fit()
    assert re.search(
        "another model, optimizer or ema_decay|begin anew in another folder, with a budget that adds", str(caught.value)
    )
    assert read_ledger(tmp_path / "ledger.jsonl").charged_steps == 3, "refused before a step is spent"


def test_what_was_spent_can_be_asked() -> None:
    t = trainer()
    assert (t.charged_steps, t.epsilon) == (0, 0.0)
    t.fit()
    assert (t.charged_steps, t.epsilon) == (6, plan().epsilon())


def test_what_an_earlier_process_spent(tmp_path) -> None:
    with pytest.raises(Cut):
        trainer(state_dir=tmp_path, progress=cut_at(3)).fit()
    t = trainer(state_dir=tmp_path)
    assert (t.charged_steps, t.epsilon) == (3, plan().epsilon(3))
    said = t.statement()
    assert (said.steps_charged, said.epsilon, said.augmult) == (3, plan().epsilon(3), K)


def test_the_statement_of_a_training_in_memory() -> None:
    t = trainer()
    t.fit()
    said = t.statement(not_accounted=["The learning rate was tried out."])
    assert (said.epsilon, said.not_accounted) == (t.epsilon, ("The learning rate was tried out.",))


def test_a_state_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no folder can be made there"):
        trainer(state_dir=tmp_path / "file" / "state").fit()


def test_physical_batches_are_no_larger_than_the_expected_one() -> None:
    sizes = []

    def noted(model, pixels, labels, keys):
        sizes.append(len(pixels))
        return objective(model, pixels, labels, keys)

    trainer(objective=noted).fit()
    assert max(sizes) <= plan().expected_batch_size


def standardised(model, pixels, labels, keys):
    x = pixels.float()
    return objective(model, (x - x.mean(0)) / 255, labels, keys)


def reweighted(model, pixels, labels, keys):
    losses = objective(model, pixels, labels, keys)
    return losses / losses.detach().mean()


def by_label_counts(model, pixels, labels, keys):
    counts = torch.bincount(labels, minlength=3)[labels].repeat_interleave(keys.augmult)
    return objective(model, pixels, labels, keys) / counts


@pytest.mark.parametrize("mixing", [standardised, reweighted, by_label_counts])
def test_objectives_that_mix_examples(mixing) -> None:
    """No gradient shows it, and it happens outside the model."""
    t = trainer(objective=mixing)
    before = weights(t.model)
    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        t.fit()
    assert t.charged_steps == 0
    assert torch.equal(weights(t.model), before)


def test_a_zero_output_layer_hides_no_objective() -> None:
    model = network()
    torch.nn.init.zeros_(model[-1].weight)
    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        trainer(model, objective=standardised).fit()
    assert not model[-1].weight.any()


def test_objectives_are_shown_again_while_weights_move() -> None:
    def later(model, pixels, labels, keys):
        """Begins to mix with the second step."""
        return (objective if keys.step < 2 and not later.moved else standardised)(model, pixels, labels, keys)

    later.moved = False
    t = trainer(objective=later, progress=lambda step, *_: setattr(later, "moved", step >= 1))
    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        t.fit()
    assert t.charged_steps == 1


def test_what_an_objective_comes_to_do_is_seen_before_the_last_step(monkeypatch) -> None:
    """It begins to mix after 3 updates, when there is no time for more repeats than the first."""
    monkeypatch.setattr("dpfast.pace.FREE", 0.0)
    monkeypatch.setattr("dpfast.pace.SHARE", 0.0)

    def later(*arguments):
        losses = objective(*arguments)
        return losses - torch.where(torch.tensor(later.mixes), losses.detach().mean(), torch.zeros(()))

    later.mixes = False
    t = trainer(objective=later, progress=lambda step, *_: setattr(later, "mixes", step >= 3))
    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        t.fit()
    assert t.charged_steps == 5


def test_objectives_that_reduce_or_know_no_keys() -> None:
    with pytest.raises(CaptureError, match=r"returned \(\) for 4 examples of 3 rows .* one loss per row"):
        trainer(objective=lambda *batch: objective(*batch).mean()).fit()
    with pytest.raises(TypeError) as caught:
        trainer(objective=lambda model, pixels, labels: None).fit()
    assert "called as objective(model, *examples, keys)" in caught.value.__notes__[0]


def test_showing_the_objective_leaves_buffers_alone() -> None:
    model = network()
    model[1] = nn.BatchNorm2d(4)
    before = model[1].running_mean.clone()
    with pytest.raises(CaptureError, match="BatchNorm in training mode"):
        trainer(model).fit()
    assert torch.equal(model[1].running_mean, before)


def test_data_sets_that_cannot_be_sampled() -> None:
    data = images()
    loader = torch.utils.data.DataLoader(list(data.images))
    dicts = [{"image": x} for x in data.images]
    ragged = [torch.zeros(1, 6 + i % 2, 6) for i in range(EXAMPLES)]
    for dataset, error, what in (
        (loader, ConfigError, "DataLoader: expected the numbered examples themselves"),
        ((data.images, data.labels), ConfigError, r"tuple of 2: .* torch.utils.data.TensorDataset\(\*tensors\)"),
        (dicts, DataError, "an example is a dict: expected a tensor"),
    ):
        with pytest.raises(error, match=what):
            DPTrainer(network(), dataset, plan(), objective=objective, optimizer=torch.optim.Adam)
    with pytest.raises(DataError, match="cannot be batched"):
        DPTrainer(network(), ragged, plan(), objective=objective, optimizer=torch.optim.Adam).fit()


def test_an_optimizer_that_is_made_already() -> None:
    model = network()
    with pytest.raises(ConfigError, match="expected what makes one from parameters"):
        DPTrainer(model, images(), plan(), objective=objective, optimizer=torch.optim.Adam(model.parameters()))


def test_square_examples_and_rare_labels() -> None:
    """As many features as the probe has examples; one positive among four hundred."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 4, generator=generator)

    def centred(model, x, keys):
        return model((x - x.mean(0)).repeat_interleave(keys.augmult, 0)).square().mean(1)

    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        DPTrainer(nn.Linear(4, 3), list(rows), plan(), objective=centred, optimizer=torch.optim.Adam).fit()
    pixels = torch.zeros(400, 1, 6, 6, dtype=torch.uint8)
    rare = ImageSet(pixels, (torch.arange(400) == 217).long(), ("a", "b", "c"))
    with pytest.raises(CaptureError, match="changing one example changes the loss of another"):
        DPTrainer(network(), rare, plan(dataset_size=400), objective=by_label_counts, optimizer=torch.optim.Adam).fit()


def hidden_in_the_gradient(rows):
    return rows.detach() + (rows - rows.detach()) / len(rows)


DIVIDED = {
    "losses": lambda rows: rows / len(rows),
    "beside a constant": lambda rows: rows / len(rows) + 100,
    "a draw besides": lambda rows: rows / (len(rows) + 0 * torch.rand(1)),
    "gradient": hidden_in_the_gradient,
}


@pytest.mark.parametrize("divided", DIVIDED.values(), ids=DIVIDED)
def test_losses_divided_by_the_size_of_the_batch_are_refused(divided) -> None:
    """How many examples a step draws is private: their share would change with each other."""
    with pytest.raises(CaptureError, match="depends on how many others are in the batch"):
        trainer(objective=lambda *given: divided(objective(*given))).fit()


def test_outputs_divided_by_the_size_of_the_batch_are_refused() -> None:
    """A cross entropy hides it near the beginning: its gradient does not."""

    class Divides(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / len(x)

    with pytest.raises(CaptureError, match="depends on how many others are in the batch"):
        trainer(Divides(network())).fit()


def test_dropout_is_no_size_of_the_batch() -> None:
    """As a layer, whose rate is put back; as a call, it is said that nothing was shown."""
    layer = network()
    layer.insert(3, nn.Dropout(0.5))
    trainer(layer, plan=plan(steps=1)).fit()
    assert layer[3].p == 0.5

    def dropped(model, pixels, labels, keys):
        rows = pixels.float().repeat_interleave(keys.augmult, 0)
        for _ in range(2):
            rows = nn.functional.dropout(rows, 0.2)
        return nn.functional.cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")

    with pytest.warns(UserWarning, match="losses change with their number, and so do the random numbers"):
        trainer(objective=dropped, plan=plan(steps=1)).fit()
