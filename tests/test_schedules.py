"""Learning rates by step: torch's own where torch has them, the same after an interruption, refused where private."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dpfast.errors import ConfigError
from dpfast.schedules import LearningRates
from test_trainer import trainer

STEPS = 12


def optimizer(*rates):
    return torch.optim.Adam([{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates])


def by_torch(make, *rates):
    """What torch's scheduler gives a real optimizer, stepped as torch's documentation says."""
    real = optimizer(*rates)
    scheduler, found = make(real), []
    for _ in range(STEPS):
        found.append([group["lr"] for group in real.param_groups])
        real.step()
        scheduler.step()
    return found


def ours(schedule, *rates, warmup_steps=0):
    found = LearningRates(optimizer(*rates), schedule, steps=STEPS, warmup_steps=warmup_steps)
    return [found.at(step) for step in range(1, STEPS + 1)]


MAKERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "partial": partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "one after another": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1, cycle_momentum=False),
}


@pytest.mark.parametrize("name", MAKERS)
def test_schedulers_give_what_they_give_in_torch(name):
    assert ours(MAKERS[name], 0.1, 0.03) == by_torch(MAKERS[name], 0.1, 0.03)


def test_a_function_is_a_lambda_of_torch():
    def factor(step):
        return 1 / (1 + step)

    assert ours(factor, 0.1, 0.03) == by_torch(lambda o: lr_scheduler.LambdaLR(o, factor), 0.1, 0.03)
    assert ours(lambda _: 0.5, 0.1) == [[0.05]] * STEPS  # one that an optimizer could be given, too


def test_a_function_is_the_scheduler_of_the_same_formula():
    def cosine(step):
        return (1 + math.cos(math.pi * step / STEPS)) / 2

    for one, other in zip(ours(cosine, 0.1), ours(MAKERS["cosine"], 0.1), strict=True):
        assert one == pytest.approx(other)


def test_warmup_is_besides():
    assert ours(None, 0.1, warmup_steps=4) == [[0.1 * min(1, step / 4)] for step in range(1, STEPS + 1)]
    for schedule in (lambda step: 0.9**step, MAKERS["cosine"]):
        plain, warm = (torch.tensor(ours(schedule, 0.1, warmup_steps=n)) for n in (0, 4))
        torch.testing.assert_close(warm[:, 0], plain[:, 0] * torch.arange(1, STEPS + 1).div(4).clamp(max=1))


def test_rates_that_are_tensors_stay_so():
    parameter = nn.Parameter(torch.zeros(2))
    given = torch.optim.Adam([parameter], lr=torch.tensor(0.1), foreach=False, capturable=True)
    for schedule in (lambda _: 0.5, MAKERS["cosine"]):
        (rate,) = LearningRates(given, schedule, steps=STEPS, warmup_steps=0).at(1)
        assert isinstance(rate, torch.Tensor)


def test_as_long_as_the_plan_is_long_enough():
    assert len(ours(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum=False), 0.1)) == STEPS


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lr_scheduler.ReduceLROnPlateau, "looks at losses, which are private"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1), "moves more than the learning rate"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5, cycle_momentum=False), "no rate for step 7 of 12"),
        (lambda step: -0.1 * step, "a factor of -0.1 for the step after 1: expected a number of 0 or more"),
        (lambda _: math.nan, "a factor of nan"),
        (partial(lr_scheduler.CosineAnnealingLR, eta_min=0.1), "T_max"),
        (lambda _: "much", r"schedule\(0\) raises ValueError"),
        (lr_scheduler.CosineAnnealingLR, "as what makes a scheduler it raises TypeError"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, words):
    with pytest.raises(ConfigError, match=words):
        ours(schedule, 0.1)


def seen(t):
    """Rates that the trainer's own optimizer steps with."""
    rates = []
    t.inner_optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    return rates


class Killed(Exception):
    pass


@pytest.mark.parametrize("schedule", [lambda step: 0.8**step, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6)])
def test_training_takes_them_and_goes_on_with_those_of_its_next_step(tmp_path, monkeypatch, schedule):
    """The rates of lost steps are lost: what is charged and not saved moves the schedule on as it moves epsilon."""
    whole = trainer(schedule=schedule)
    expected = seen(whole)
    whole.fit()
    assert len(expected) == 6
    assert expected == [whole.rates.at(step)[0] for step in range(1, 7)]
    assert len(set(expected)) == 6

    def kill(step, *_):
        if step == 3:
            raise Killed

    monkeypatch.setattr("dpfast.trainer.CHECKPOINTS", 1)  # none after the one before the first step
    first = trainer(schedule=schedule, state_dir=tmp_path, progress=kill)
    before = seen(first)
    with pytest.raises(Killed):
        first.fit()
    resumed = trainer(schedule=schedule, state_dir=tmp_path)
    after = seen(resumed)
    resumed.fit()
    assert resumed.lost_steps == 3
    assert before + after == expected


def test_a_schedule_that_ends_early_is_refused_before_anything_is_spent():
    with pytest.raises(ConfigError, match="no rate for step 5 of 6"):
        trainer(schedule=lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=3, cycle_momentum=False))
