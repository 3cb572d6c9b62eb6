"""A choice by noised counts: what one image can change, who pays for it, and when."""

import math

import dp_accounting
import numpy as np
import pytest
import torch

from dpfast.errors import BudgetExhausted, ConfigError, PrivacyError
from dpfast.privacy import Ledger, PrivacyStatement, choice_release, entropy, noised_choice, read_ledger
from dpfast.testing import injected_entropy
from test_ledger import make_plan

SIGMA = 30.0
COUNTS = torch.tensor([410, 450, 300, 445])


RELEASE = choice_release(settings=4, sigma=SIGMA)


@pytest.mark.parametrize("neighbours", ["one more", "exchanged"])
def test_one_image_moves_the_counts_by_at_most_what_the_release_says(neighbours):
    """Over random classifiers and data sets, and where every classifier is right about the one image alone."""
    random = np.random.default_rng(0)
    for settings in (2, 5, 12):
        sensitivity = SIGMA / choice_release(settings=settings, sigma=SIGMA).noise_multiplier
        moved = []
        for trial in range(200):
            rate = 0.0 if trial == 0 else random.uniform()
            correct = random.random((settings, 50)) < rate
            one = correct.copy()
            if neighbours == "exchanged":
                one[:, 0] = True if trial == 0 else random.random(settings) < 0.5
            else:
                extra = np.ones((settings, 1), bool) if trial == 0 else random.random((settings, 1)) < 0.5
                one = np.concatenate([one, extra], axis=1)
            moved.append(np.linalg.norm(one.sum(1) - correct.sum(1)))
        assert max(moved) <= sensitivity + 1e-12
        assert moved[0] == pytest.approx(sensitivity)  # no smaller figure would do


def test_the_plan_pays_for_it_before_the_first_step():
    plan = make_plan(other_releases=[RELEASE])
    exact = dp_accounting.get_epsilon_gaussian(SIGMA / math.sqrt(4), 1e-5)
    assert exact <= plan.epsilon(0) <= exact + 1e-3
    assert Ledger(None, plan).epsilon() == plan.epsilon(0)
    # An exchange moves each count by 1 too: what the accountant assumes of exchanges errs on the safe side.
    assert make_plan(other_releases=[RELEASE], neighboring="replace").epsilon(0) > exact


def test_it_is_charged_before_the_noise_is_drawn(tmp_path, monkeypatch):
    events = []
    with Ledger(tmp_path / "ledger", make_plan(other_releases=[RELEASE])) as ledger:
        charge = ledger.charge_release
        monkeypatch.setattr(ledger, "charge_release", lambda release: events.append("charge") or charge(release))
        monkeypatch.setattr(entropy, "source", lambda n, real=entropy.source: events.append("draw") or real(n))
        noised_choice(COUNTS, sigma=SIGMA, ledger=ledger)
    assert events == ["charge", "draw"]


@pytest.mark.parametrize(
    ("listed", "given"),
    [
        ([], {}),
        ([choice_release(settings=4, sigma=SIGMA + 1)], {}),
        ([choice_release(settings=3, sigma=SIGMA)], {}),
        ([RELEASE], {"sigma": SIGMA - 1}),
        ([RELEASE], {"description": "another"}),
    ],
)
def test_it_refuses_to_draw_what_is_not_accounted_for(listed, given, monkeypatch):
    monkeypatch.setattr(entropy, "source", None)
    with (
        Ledger(None, make_plan(other_releases=listed)) as ledger,
        pytest.raises(PrivacyError, match="not accounted for"),
    ):
        noised_choice(COUNTS, ledger=ledger, **{"sigma": SIGMA, **given})


def test_it_is_drawn_once_however_often_the_run_is_resumed(tmp_path):
    plan = make_plan(other_releases=[RELEASE])
    with Ledger(tmp_path / "ledger", plan) as ledger:
        noised_choice(COUNTS, sigma=SIGMA, ledger=ledger)
    with Ledger(tmp_path / "ledger", plan) as ledger, pytest.raises(BudgetExhausted, match="all planned draws"):
        noised_choice(COUNTS, sigma=SIGMA, ledger=ledger)


def test_the_noise_has_the_stated_size_and_moves_the_choice():
    plan = make_plan(other_releases=[RELEASE])
    with injected_entropy(1):
        drawn = [noised_choice(COUNTS, sigma=SIGMA, ledger=Ledger(None, plan)) for _ in range(500)]
    noise = np.array([choice.noised_counts for choice in drawn]) - COUNTS.numpy()
    assert abs(noise.mean()) < 4 * SIGMA / math.sqrt(noise.size)
    assert noise.std() == pytest.approx(SIGMA, rel=0.07)
    assert abs(np.corrcoef(noise.T) - np.eye(4)).max() < 4 / math.sqrt(500)
    assert all(choice.index == int(np.argmax(choice.noised_counts)) for choice in drawn)
    wins = np.bincount([choice.index for choice in drawn], minlength=4)
    assert wins[[1, 3]].min() > 100
    assert wins[2] < 5


def test_with_little_noise_the_best_wins():
    with Ledger(None, make_plan(other_releases=[choice_release(settings=4, sigma=2.0)])) as ledger:
        assert noised_choice(10 * COUNTS, sigma=2.0, ledger=ledger).index == 1


def test_the_statement_names_it():
    with Ledger(None, make_plan(other_releases=[RELEASE])) as ledger:
        statement = PrivacyStatement.of(ledger, augmult=1, public=[], not_accounted=[])
    assert statement.other_releases == ("noised choice among settings (1 x, noise multiplier 15)",)


@pytest.mark.parametrize(("settings", "sigma"), [(1, 1.0), (4, 0.0), (4, -1.0), (4, math.inf), (4, math.nan)])
def test_wrong_releases_are_refused(settings, sigma):
    with pytest.raises(ConfigError, match=f"settings={settings}, sigma={sigma}"):
        choice_release(settings=settings, sigma=sigma)


@pytest.mark.parametrize("counts", [COUNTS.float(), COUNTS[None]])
def test_counts_that_are_none_are_refused_without_being_told(counts, tmp_path):
    with Ledger(tmp_path / "ledger", make_plan(other_releases=[RELEASE])) as ledger:
        with pytest.raises(ConfigError, match=r"int64 \[settings\]") as refused:
            noised_choice(counts, sigma=SIGMA, ledger=ledger)
        assert "410" not in str(refused.value)
    assert read_ledger(tmp_path / "ledger").charged_steps == 0
