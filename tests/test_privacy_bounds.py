"""Lower bounds on epsilon: right where the truth is known, never above it more often than they say."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from dpfast.errors import ConfigError
from dpfast.privacy import Plan
from dpfast.privacy.bounds import one_run_bound, one_run_chance, rate_limits, two_worlds_bound

DELTA = 1e-5


def gaussian(sigma, count, seed):
    """Scores of the Gaussian mechanism without and with an example that moves the sum by 1."""
    random = np.random.default_rng(seed)
    return sigma * random.standard_normal(count), 1 + sigma * random.standard_normal(count)


def exact(sigma):
    """Of one step with everybody in it."""
    plan = Plan(
        dataset_size=10, expected_batch_size=10, max_grad_norm=1.0, steps=1, target_delta=DELTA, noise_multiplier=sigma
    )
    return plan.epsilon()


def test_rate_limits_leave_as_much_beyond_as_they_say():
    for hits, trials in ((0, 20), (1, 20), (7, 20), (20, 20)):
        low, high = rate_limits(hits, trials, confidence=0.9)
        assert low == 0 or binom.sf(hits - 1, trials, low) == pytest.approx(0.1)
        assert high == 1 or binom.cdf(hits, trials, high) == pytest.approx(0.1)


@pytest.mark.parametrize(("sigma", "least"), [(0.3, 5.5), (1.0, 2.0)])
def test_two_worlds_come_near_a_gaussian_from_below(sigma, least):
    """As near as 10,000 scores let it: of what is never seen in so many, a rate of 3.7e-4 is all that can be said."""
    bound = two_worlds_bound(*gaussian(sigma, 20_000, 0), delta=DELTA)
    assert least < bound.epsilon < exact(sigma)


def test_a_bound_holds_as_often_as_it_says():
    """Of randomised response, whose epsilon is log 3: above it in at most 5% of 400 attacks (and three deviations)."""
    random = np.random.default_rng(1)
    over = 0
    for _ in range(400):
        absent, present = (random.random(60) < rate for rate in (0.25, 0.75))
        over += two_worlds_bound(absent.astype(float), present.astype(float), delta=0.0).epsilon > math.log(3)
    assert over <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_an_event_may_be_likelier_without_the_example():
    """A score that is never 0 with the example, and 1 as often as not without it."""
    absent, present = np.arange(400) // 2 % 2, np.ones(400)
    bound = two_worlds_bound(absent, present, delta=DELTA)
    low, _ = rate_limits(100, 200, confidence=0.975)
    _, high = rate_limits(0, 200, confidence=0.975)
    assert bound.epsilon == pytest.approx(math.log((low - DELTA) / high))


def test_worlds_that_are_alike_give_nothing():
    random = np.random.default_rng(3)
    assert two_worlds_bound(*random.standard_normal((2, 4000)), delta=DELTA).epsilon < 0.5
    assert two_worlds_bound([1.0] * 50, [1.0] * 50, delta=DELTA).epsilon == 0


def test_one_run_of_randomised_response():
    """Whether it took part is told rightly with e^2 / (1 + e^2): epsilon 2, of which 4,000 examples show most."""
    random = np.random.default_rng(4)
    included = random.random(4000) < 0.5
    told = included ^ (random.random(4000) > 1 / (1 + math.exp(-2)))
    bound = one_run_bound(told.astype(float), included, delta=0.0, guesses=[4000])
    assert 1.8 < bound.epsilon < 2


def test_one_run_against_the_definition():
    """P[W >= v] alone where delta is 0; with delta the largest share of what lies just below v."""
    assert one_run_chance(100, 20, 15, 1.0, 0.0) == pytest.approx(binom.sf(14, 20, math.e / (1 + math.e)))
    rate = math.e / (1 + math.e)
    shares = [sum(binom.pmf(15 - j, 20, rate) for j in range(1, i + 1)) / i for i in range(1, 16)]
    expected = binom.sf(14, 20, rate) + 2 * 100 * 1e-3 * max(shares)
    assert one_run_chance(100, 20, 15, 1.0, 1e-3) == pytest.approx(expected)


def test_one_run_of_scores_that_tell_nothing():
    random = np.random.default_rng(5)
    assert one_run_bound(random.standard_normal(1000), random.random(1000) < 0.5, delta=DELTA).epsilon == 0


def test_one_run_abstains_where_scores_are_in_the_middle():
    """Gaussian scores of one unit's distance: guessing the clearest tenth shows more than guessing all."""
    random = np.random.default_rng(6)
    included = random.random(5000) < 0.5
    scores = included + random.standard_normal(5000)
    few, every = (one_run_bound(scores, included, delta=DELTA, guesses=[n]).epsilon for n in (500, 5000))
    assert every < few < exact(1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: two_worlds_bound([0.0] * 5, [1.0] * 50, delta=0.1),
        lambda: two_worlds_bound([math.nan] * 50, [1.0] * 50, delta=0.1),
        lambda: two_worlds_bound([0.0] * 50, [1.0] * 50, delta=1.5),
        lambda: one_run_bound([0.0, math.inf], [True, False], delta=0.1),
        lambda: one_run_bound([0.0, 1.0], [True], delta=0.1),
    ],
)
def test_what_no_bound_can_be_made_of_is_refused(call):
    with pytest.raises(ConfigError, match="expected"):
        call()
