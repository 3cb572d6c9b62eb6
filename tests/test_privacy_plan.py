"""Plan: the epsilon it reports, the noise it calibrates, and the values it refuses."""

import json
import math
import subprocess
import sys
import warnings

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, stats

from dpfast.errors import ConfigError
from dpfast.privacy import GaussianRelease, Plan, accounting, composed_epsilon

HISTOGRAM = GaussianRelease(description="histogram", noise_multiplier=8.0)


def make(**changes):
    values = {
        "dataset_size": 1436,
        "expected_batch_size": 359,
        "max_grad_norm": 0.5,
        "steps": 80,
        "target_delta": 1e-4,
        "noise_multiplier": 1.238,
    }
    if "target_epsilon" in changes:
        del values["noise_multiplier"]
    return Plan(**{**values, **changes})


def delta_by_quadrature(upper, lower, epsilon):
    """delta(epsilon) = integral of (upper - e^epsilon lower)+ over the line, for two densities."""
    x, step = np.linspace(-20, 20, 200_001, retstep=True)
    return np.maximum(upper(x) - math.exp(epsilon) * lower(x), 0).sum() * step


@pytest.mark.parametrize(
    ("size", "batch", "steps", "delta", "renyi"),
    [
        (50_000, 16_384, 200, 1e-5, {1: 18.85, 5: 4.54, 10: 2.62}),
        (302_436, 16_384, 200, 3e-6, {1: 3.51, 5: 1.12, 10: 0.80}),
        (60_000, 4_096, 4_000, 1e-5, {1: 17.51, 5: 4.20, 10: 2.44}),
    ],
)
def test_the_noise_of_large_settings(size, batch, steps, delta, renyi):
    """Renyi accounting gives what another program found; privacy loss distributions ask for less."""
    mechanism = accounting.Mechanism(sample_rate=batch / size, noise_multiplier=1.0, steps=steps)
    for epsilon, expected in renyi.items():
        found = accounting.rdp_noise_multiplier(mechanism, epsilon, delta)
        assert found == pytest.approx(expected, rel=0.01)
        assert 0.9 * found < accounting.calibrate(mechanism, epsilon, delta) < found


def test_another_release_with_hardly_any_noise():
    """Its loss lies far out: on the usual grid it would fill the memory."""
    release = GaussianRelease(description="almost the data", noise_multiplier=0.02)
    mu = 1 / release.noise_multiplier  # Gaussian differential privacy: Dong, Roth and Su 2022
    found = make(other_releases=[release]).epsilon(0)
    exact = optimize.brentq(
        lambda e: stats.norm.cdf(mu / 2 - e / mu) - math.exp(e + stats.norm.logcdf(-mu / 2 - e / mu)) - 1e-4, 1000, 2000
    )
    assert exact <= found <= 1.001 * exact


@pytest.mark.parametrize("neighboring", ["add_remove", "replace"])
def test_one_step_agrees_with_an_integral(neighboring):
    q, sigma = 0.25, 1.5
    epsilon = make(steps=1, noise_multiplier=sigma, neighboring=neighboring).epsilon()
    moved = lambda by: lambda x: (1 - q) * stats.norm.pdf(x, 0, sigma) + q * stats.norm.pdf(x, by, sigma)  # noqa: E731
    pairs = {"add_remove": (moved(0), moved(1)), "replace": (moved(-1), moved(1))}[neighboring]
    delta = max(delta_by_quadrature(*pairs, epsilon), delta_by_quadrature(*pairs[::-1], epsilon))
    assert delta == pytest.approx(1e-4, rel=2e-3)


def test_full_batches_agree_with_the_analytic_gaussian():
    plan = make(expected_batch_size=1436, steps=9, noise_multiplier=6.0)
    assert plan.epsilon() == pytest.approx(dp_accounting.get_epsilon_gaussian(6 / 3, 1e-4), abs=1e-3)


def test_replace_contains_the_factor_two_once():
    plan = make(expected_batch_size=1436, steps=1, noise_multiplier=4.0, neighboring="replace")
    assert plan.epsilon() == pytest.approx(dp_accounting.get_epsilon_gaussian(4 / 2, 1e-4), abs=1e-3)
    assert make(noise_multiplier=9.0, neighboring="replace").epsilon() > make(noise_multiplier=9.0).epsilon()


@pytest.mark.parametrize(("target", "expected"), [(10, 1.238), (1, 7.273)])
def test_calibration_of_the_digits_plan(target, expected):
    plan = make(target_epsilon=target)
    # The expected values were calibrated on a coarser tolerance, on the safe side of ours.
    assert expected * 0.999 < plan.noise_multiplier <= expected
    assert plan.epsilon() <= target
    assert make(noise_multiplier=plan.noise_multiplier * 0.999).epsilon() > target


def test_calibration_is_checked_on_the_reporting_grid(monkeypatch):
    monkeypatch.setattr(accounting, "_solve", lambda *_: 7.25)  # a little too low for epsilon 1
    plan = make(target_epsilon=1.0001)
    assert plan.epsilon() <= 1.0001
    assert 7.25 < plan.noise_multiplier < 7.28


def test_calibration_of_ten_thousand_steps():
    plan = make(dataset_size=50_000, expected_batch_size=2048, steps=10_000, target_delta=1e-5, target_epsilon=10)
    assert plan.noise_multiplier == pytest.approx(2.1729, abs=1.5e-3)
    assert 9.99 < plan.epsilon() <= 10


@pytest.mark.parametrize("steps", [10_000, 10_001, 1_000_000])
@pytest.mark.parametrize(("noise", "neighboring"), [(0.4, "add_remove"), (10.0, "add_remove"), (4.0, "replace")])
def test_many_steps_are_bounded_from_above_and_tightly(steps, noise, neighboring):
    """Full batches compose to one Gaussian mechanism, whose epsilon has a closed form."""
    sigma = noise * math.sqrt(steps)
    plan = make(expected_batch_size=1436, steps=steps, noise_multiplier=sigma, neighboring=neighboring)
    exact = dp_accounting.get_epsilon_gaussian(noise / (2 if neighboring == "replace" else 1), 1e-4)
    assert exact <= plan.epsilon() <= 1.003 * exact


def test_a_million_steps_are_calibrated_without_huge_integers(monkeypatch):
    """dp-accounting raises a number of points to the power of the steps it is asked for at once: minutes of work."""
    from dp_accounting.pld import pld_pmf

    real, asked = pld_pmf.SparsePLDPmf.self_compose, []
    spy = lambda self, count, *rest: asked.append(count) or real(self, count, *rest)  # noqa: E731
    monkeypatch.setattr(pld_pmf.SparsePLDPmf, "self_compose", spy)
    plan = make(expected_batch_size=1436, steps=1_000_000, target_epsilon=1)
    assert max(asked) <= 10_000
    exact = dp_accounting.get_epsilon_gaussian(plan.noise_multiplier / 1000, 1e-4)
    assert 0.995 < exact <= plan.epsilon() <= 1


@pytest.mark.parametrize("target", [650, 1000, 9000])
@pytest.mark.parametrize("neighboring", ["add_remove", "replace"])
def test_epsilons_beyond_the_exponential_are_calibrated_quietly(target, neighboring):
    plan = make(target_epsilon=target, neighboring=neighboring)
    assert 0.98 * target < plan.epsilon() <= target
    whole = make(expected_batch_size=1436, target_epsilon=target, neighboring=neighboring)
    noise = whole.noise_multiplier / math.sqrt(80) / (2 if neighboring == "replace" else 1)
    assert 0.98 * target < dp_accounting.get_epsilon_gaussian(noise, 1e-4) <= whole.epsilon() <= target


def test_calibration_for_replace():
    plan = make(target_epsilon=10, neighboring="replace")
    assert 9.99 < plan.epsilon() <= 10
    assert plan.noise_multiplier > 1.5 * 1.238


def test_other_releases_are_paid_first():
    plan = make(target_epsilon=1, other_releases=[HISTOGRAM])
    assert plan.epsilon() <= 1
    assert plan.epsilon(0) == pytest.approx(dp_accounting.get_epsilon_gaussian(8, 1e-4), abs=1e-3)
    assert plan.noise_multiplier > 7.5


def test_an_event_and_a_release_cost_the_same():
    event = dp_accounting.GaussianDpEvent(8.0)
    costs = [make(noise_multiplier=9.0, other_releases=[release]).epsilon() for release in (event, HISTOGRAM)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-9)
    assert costs[0] > make(noise_multiplier=9.0).epsilon()


def test_unreachable_targets_name_the_best_and_the_cure():
    with pytest.raises(ConfigError, match=r"epsilon is still 0\.35.*other releases"):
        make(target_epsilon=0.3, other_releases=[HISTOGRAM])
    with pytest.raises(ConfigError, match="raise target_delta"):
        make(target_epsilon=3, target_delta=1e-25)


def test_releases_that_cannot_be_accounted():
    with pytest.raises(ConfigError, match="express it as a GaussianRelease"):
        make(other_releases=[dp_accounting.LaplaceDpEvent(2.0)], neighboring="replace")
    with pytest.raises(ConfigError, match="one by one"):
        make(other_releases=[dp_accounting.ComposedDpEvent([])])
    with pytest.raises(ConfigError, match="got 'histogram'"):
        make(other_releases=["histogram"])
    with pytest.raises(ConfigError, match="count >= 1"):
        GaussianRelease(description="none", noise_multiplier=1.0, count=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset_size": 0}, "dataset_size=0"),
        ({"dataset_size": 10.5}, "dataset_size=10.5"),
        ({"expected_batch_size": 1437}, "at most dataset_size=1436"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
        ({"expected_batch_size": "64"}, "expected_batch_size='64'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"target_delta": 0.0}, "target_delta=0.0"),
        ({"target_delta": 1.0}, "target_delta=1.0"),
        ({"target_delta": math.nan}, "target_delta=nan"),
        ({"target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"target_epsilon": -3}, "target_epsilon=-3"),
        ({"target_epsilon": 1e5}, "target_epsilon=100000.0"),
        ({"target_epsilon": None, "noise_multiplier": None}, "got neither"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": 0.0}, r"target_epsilon=math\.inf"),
        ({"neighboring": "swap"}, "neighboring='swap'"),
    ],
)
def test_wrong_values_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        make(**changes)


def test_all_wrong_values_come_in_one_message():
    with pytest.raises(ConfigError, match=r"(?s)dataset_size=0.*max_grad_norm=0.*steps=-1.*noise_multiplier=0"):
        make(dataset_size=0, max_grad_norm=0, steps=-1, noise_multiplier=0)


def test_a_delta_that_publishing_one_record_satisfies_is_warned_about():
    with pytest.warns(UserWarning, match="publishes one random image in full") as caught:
        make(target_delta=1 / 1436)
    assert caught[0].filename == make.__code__.co_filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(target_delta=0.999 / 1436)


def test_infinite_epsilon_is_no_noise():
    plan = make(target_epsilon=math.inf)
    assert plan.noise_multiplier == 0
    assert not plan.is_private
    assert plan.epsilon() == math.inf
    assert plan.membership_accuracy() == 1.0


def test_next_to_no_noise_is_infinite_epsilon_soon():
    assert make(noise_multiplier=1e-3).epsilon() == math.inf


def test_large_epsilons_use_a_wider_grid_and_stay_upper_bounds():
    plan = make(expected_batch_size=1436, noise_multiplier=0.5)
    exact = dp_accounting.get_epsilon_gaussian(0.5 / math.sqrt(80), 1e-4)
    assert exact <= plan.epsilon() <= exact * 1.001


def test_the_curve_never_falls_and_ends_at_epsilon():
    plan = make(noise_multiplier=4.0)
    steps, epsilons = zip(*plan.epsilon_curve(5), strict=True)
    assert steps == (0, 20, 40, 60, 80)
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[0] == 0
    assert epsilons[-1] == plan.epsilon()
    assert epsilons[2] == pytest.approx(plan.epsilon(40), abs=2e-3)
    assert plan.epsilon_curve(1)[-1] == (80, plan.epsilon())
    assert [step for step, _ in plan.epsilon_curve(5, early=True)] == [0, 1, 2, 5, 20, 45, 80]
    assert [step for step, _ in make(steps=1).epsilon_curve(5, early=True)] == [0, 1]


def test_membership_accuracy_of_one_gaussian():
    plan = make(expected_batch_size=1436, steps=1, noise_multiplier=2.0)
    assert plan.membership_accuracy() == pytest.approx(stats.norm.cdf(1 / (2 * 2.0)), abs=1e-3)
    assert plan.membership_accuracy(0) == pytest.approx(0.5)


def test_composition_lies_between_the_worst_and_the_sum():
    plan, other = make(noise_multiplier=4.0), make(noise_multiplier=6.0)
    both = composed_epsilon([(plan, 80), (other, 80)], target_delta=1e-4)
    assert plan.epsilon() < both < plan.epsilon() + other.epsilon()
    assert composed_epsilon([(plan, 40), (plan, 40)], target_delta=1e-4) == pytest.approx(plan.epsilon(), abs=1e-3)
    with pytest.raises(ConfigError, match="one neighbouring relation"):
        composed_epsilon([(plan, 1), (make(neighboring="replace"), 1)], target_delta=1e-4)


def test_every_field_moves_the_fingerprint():
    changes = {
        "dataset_size": 1437,
        "expected_batch_size": 360,
        "max_grad_norm": 0.6,
        "steps": 81,
        "target_delta": 1e-5,
        "noise_multiplier": 1.239,
        "neighboring": "replace",
        "other_releases": [HISTOGRAM],
    }
    prints = {make(**{name: value}).fingerprint() for name, value in changes.items()}
    prints |= {make().fingerprint(), make(target_epsilon=math.inf).fingerprint()}
    assert len(prints) == len(changes) + 2
    assert make().fingerprint() == make().fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_epsilon": 1},
        {"target_epsilon": math.inf},
        {"other_releases": [HISTOGRAM, dp_accounting.SelfComposedDpEvent(dp_accounting.LaplaceDpEvent(9.0), 2)]},
    ],
)
def test_a_plan_survives_json_without_calibration(changes, monkeypatch):
    plan = make(**changes)
    monkeypatch.setattr(accounting, "calibrate", None)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()
    assert again.epsilon(0) == plan.epsilon(0)


def test_importing_is_light():
    code = "import sys, dpfast.privacy, dpfast.optimizer; print(sorted({'dp_accounting', 'scipy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
