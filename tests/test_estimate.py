"""What --dry-run announces is measured on the steps that the run will take."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from dpfast.data.keyed import RowKeys
from dpfast.diffusion import DiffusionObjective
from dpfast.evaluation import ClassifierObjective
from dpfast.physical import NUMBERS
from dpfast.recipes import load
from dpfast.runs import build
from dpfast.runs import estimate as module
from dpfast.runs.elsewhere import state_bytes
from dpfast.runs.estimate import estimate
from dpfast.runs.foresee import HERE, foresee
from dpfast.runs.pipeline import open_run
from dpfast.trainer import DPTrainer
from test_runs import EDM, TINY

LARGE = ("private.sample_rate=1", "private.augmult=8", "baseline.sample_rate=0.5", "baseline.augmult=2")


@pytest.fixture
def rows(monkeypatch):
    """Rows of every physical batch, by objective."""
    seen = {DiffusionObjective: [], ClassifierObjective: []}

    def spy(kind):
        real = kind.__call__

        def call(self, model, *examples):
            assert isinstance(examples[-1], RowKeys)
            seen[kind].append(examples[-1].rows)
            return real(self, model, *examples)

        monkeypatch.setattr(kind, "__call__", call)

    spy(DiffusionObjective)
    spy(ClassifierObjective)
    return seen


def test_every_stage_is_measured_with_the_batches_it_will_have(tmp_path, rows):
    cost = estimate(open_run(load("digits", [*TINY, *LARGE]), tmp_path))
    assert set(cost.seconds) == set(cost.image_passes) == {"pretrain", "train", "sample", "baseline", "evaluate"}
    assert all(value > 0 for value in cost.seconds.values())
    full = NUMBERS // 64  # what DPTrainer makes of 8x8 pixels
    assert max(rows[DiffusionObjective]) == max(rows[ClassifierObjective]) == full
    assert cost.image_passes["train"] == 4 * 1437 * 8
    assert cost.image_passes["baseline"] == 4 * 1437 + 2 * 128  # the public classifier is made there
    assert cost.memory > 1e8
    assert list(tmp_path.iterdir()) == []


def test_heuns_calls_are_those_that_are_counted_and_timed(tmp_path, monkeypatch):
    class Network(torch.nn.Linear):
        rows = 0

        def forward(self, x, t, labels):
            self.rows += len(x)
            return x

    def once(draw):
        draw()
        return 6.0

    monkeypatch.setattr(module, "_timed", once)
    for settings, calls in (((), 2 * 20 * 7), (("guidance=2",), 4 * 20 * 7)):
        run = open_run(load("digits", [*TINY, *EDM, "sample.steps=4", *settings]), tmp_path)
        assert module.image_passes(run)["sample"] == calls
        network = Network(1, 1)
        assert module._sampling_time(run, network) == pytest.approx(6.0 / network.rows)
        assert network.rows == 20 * 3
    (here,) = [of for of in foresee(run) if of.device == HERE]
    assert here.seconds["train"] > 0
    assert here.seconds["sample"] / calls == pytest.approx(here.seconds["pretrain"] / (3 * 8) / 3)


def test_long_steps_are_scaled_up_without_their_fixed_part(tmp_path, monkeypatch):
    run = open_run(load("digits", [*TINY, *LARGE]), tmp_path)
    monkeypatch.setattr(module._Measured, "_step", lambda self, batch: 5.0 + 0.01 * batch)
    measured = module._Measured(run, run.recipe.private, run.plan, None, None)
    assert measured.seconds() == pytest.approx(4 * (5.0 + 0.01 * 1437))


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        ("none", [(128, 8), (1437, 8)]),
        ("10_000", [(1, 8), (12, 8)]),
        ("5_000", [(1, 4), (6, 8)]),
    ],
)
def test_what_is_foreseen_keeps_to_the_memory_budget(tmp_path, monkeypatch, budget, sizes):
    """In the physical batches that DPTrainer makes, of as many images or rows as are predicted to fit each device."""

    def plan_step(self, size=None, *, device=None):
        size = size or self.physical_size
        peak = (100 if device else 1000) * size.examples * size.rows
        second = SimpleNamespace(seconds=1)
        return SimpleNamespace(peak=peak, private=second, ordinary=second)

    monkeypatch.setattr(DPTrainer, "plan_step", plan_step)
    run = open_run(load("digits", [*TINY, *LARGE, f"memory_budget={budget}"]), tmp_path)
    objective, model = build.private_objective(run.recipe, run.private), build.unet(run.recipe, run.private)
    trainer = build.private_trainer(run.recipe, run.recipe.private, model, run.private, run.plan, objective)
    here, *others = foresee(run)
    assert here.device == HERE
    assert astuple(trainer.physical_size) == sizes[0]
    for foreseen, (examples, rows), each in ((here, sizes[0], 1000), *((of, sizes[1], 100) for of in others)):
        assert foreseen.memory == each * examples * rows + state_bytes(model)
        assert foreseen.seconds["train"] == pytest.approx(4 * 1437 * 8 / (examples * rows))
