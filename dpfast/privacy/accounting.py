"""Epsilon of Poisson-subsampled Gaussian training, through dp-accounting. Nothing is derived anew here.

All figures come from privacy loss distributions (PLD, Koskela et al. 2020; Doroshenko et al. 2022), whose
discretisation only ever overstates epsilon. How finely they are discretised, and where a search begins, is read off
the moments of one step's privacy loss; that moves speed and tightness, never the direction of the error.
dp-accounting is imported on first use: that takes seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np

from dpfast.errors import ConfigError

Neighboring = Literal["add_remove", "replace"]

REPORT_INTERVAL = 1e-4
CALIBRATE_INTERVAL = 1e-3

# Above this epsilon the grid is widened in proportion: it would grow with epsilon and say no more.
_FINE_UP_TO = 50.0
# A grid of a tenth of one step's standard deviation overstates epsilon by about 0.1% however many steps there are;
# a wider one has been seen to double it (a million steps at epsilon 1 on a grid of 1e-3).
_PER_DEVIATION = 10
# Points of one step's grid, at most: each costs about 30 microseconds.
_MOST_POINTS = 50_000
# Above this one infinity is reported: a true bound, for a promise that is worth nothing.
_INFINITE_FROM = 1e5
# No use of training needs more noise; what is still above the target here is not the training's doing.
_MAX_SIGMA = 1e6
# Calibrated multipliers are rounded up to this, so that a platform's last bits do not make it another plan.
_SIGMA_STEP = 1e-4
# Steps are composed by so many once there are more than ten times as many: at once, dp-accounting computes an integer
# with as many digits as there are steps (a million steps: 7 s against 0.3 s).
_CHUNK = 1000
_RDP_ORDERS = (*range(2, 64), *range(64, 257, 16), 512, 1024)


@dataclass(frozen=True)
class Mechanism:
    """What the accountant needs to know of a whole run; ``others`` are further dp-accounting events."""

    sample_rate: float
    noise_multiplier: float
    steps: int
    others: tuple[Any, ...] = ()
    neighboring: Neighboring = "add_remove"


def accountant_name() -> str:
    """The accountant behind reported figures, for people to read."""
    from importlib.metadata import version

    grid = f"grid {REPORT_INTERVAL:g} or finer up to epsilon {_FINE_UP_TO:g}, wider beyond"
    return f"privacy loss distributions (dp-accounting {version('dp-accounting')}), {grid}"


@lru_cache(maxsize=1024)
def epsilon(mechanism: Mechanism, delta: float, interval: float = REPORT_INTERVAL) -> float:
    """Upper bound on epsilon at ``delta`` of releasing everything in ``mechanism``; inf without noise."""
    return _losses((mechanism,), interval).epsilon(delta)


def composed_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Upper bound on epsilon at ``delta`` of releasing all results of ``mechanisms`` from the same data."""
    return _losses(mechanisms, REPORT_INTERVAL).epsilon(delta)


def membership_accuracy(mechanism: Mechanism) -> float:
    """Upper bound on how often anybody guesses rightly whether one given image was used, 0.5 being a coin.

    (1 + delta(epsilon = 0)) / 2 of the whole privacy curve: the total variation bound of hypothesis testing
    (Wasserman and Zhou 2010; Kairouz et al. 2015), for an image that was used with probability one half.
    """
    return min(1.0, 0.5 + 0.5 * _losses((mechanism,), CALIBRATE_INTERVAL).delta(0.0))


@lru_cache(maxsize=256)
def calibrate(mechanism: Mechanism, target_epsilon: float, delta: float) -> float:
    """The least noise multiplier, rounded up to 1e-4, whose *reported* epsilon is at most ``target_epsilon``.

    The multiplier in ``mechanism`` is ignored. Raises ConfigError, with the best epsilon that can be reached,
    when no amount of noise suffices.
    """
    others = epsilon(replace(mechanism, steps=0), delta, CALIBRATE_INTERVAL)
    if others >= target_epsilon:
        raise _unreachable(
            target_epsilon, delta, others, "that is what the other releases cost: raise the target or release less"
        )
    sigma = _round_up(_solve(mechanism, target_epsilon, delta))
    while epsilon(replace(mechanism, noise_multiplier=sigma), delta) > target_epsilon:
        sigma = _round_up(sigma * 1.0005)
    return sigma


def rdp_noise_multiplier(mechanism: Mechanism, target_epsilon: float, delta: float) -> float:
    """The multiplier that Renyi accounting asks for (Mironov 2017; Mironov et al. 2019), to compare with published
    figures: 4% to 10% larger than ``calibrate``'s in the paper's settings. Whole orders from 2 on.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    def event(sigma: float) -> Any:
        return _training_event(replace(mechanism, noise_multiplier=sigma))

    bracket = dp.LowerEndpointAndGuess(1e-3, calibrate(mechanism, target_epsilon, delta))
    fresh = partial(RdpAccountant, _RDP_ORDERS)
    return float(dp.calibrate_dp_mechanism(fresh, event, target_epsilon, delta, bracket, tol=1e-4))


def _unreachable(target: float, delta: float, best: float, cure: str) -> ConfigError:
    return ConfigError(
        f"target_epsilon={target:g} cannot be reached at target_delta={delta:g}: with unlimited noise epsilon is still"
        f" {best:.4g}; {cure}"
    )


def _round_up(sigma: float) -> float:
    return round(math.ceil(sigma / _SIGMA_STEP) * _SIGMA_STEP, 10)


def _solve(mechanism: Mechanism, target: float, delta: float) -> float:
    """The multiplier whose epsilon on the calibration grid is ``target``, to 1e-5 relative."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        tried = replace(mechanism, noise_multiplier=math.exp(log_sigma))
        return min(epsilon(tried, delta, CALIBRATE_INTERVAL), _INFINITE_FROM) - target

    highest = math.log(_MAX_SIGMA)
    high = min(math.log(_guess(mechanism, target, delta)), highest)
    while excess(high) > 0:
        if high == highest:
            raise _unreachable(
                target, delta, excess(high) + target, "no accountant resolves so small a delta: raise target_delta"
            )
        high = min(high + 0.3, highest)
    low = high - 0.3
    while excess(low) <= 0:
        low -= 0.3
    return math.exp(brentq(excess, low, high, xtol=1e-5))


def _guess(mechanism: Mechanism, target: float, delta: float) -> float:
    """A multiplier near the one that is sought."""
    from scipy.optimize import brentq

    def gap(log_sigma: float) -> float:
        tried = replace(mechanism, noise_multiplier=math.exp(log_sigma))
        return math.log(max(_rough_epsilon(tried, delta), 1e-12) / target)

    low, high = math.log(1e-3), math.log(_MAX_SIGMA)
    if gap(low) <= 0 or gap(high) >= 0:
        return 1e-3 if gap(low) <= 0 else _MAX_SIGMA
    return math.exp(brentq(gap, low, high, xtol=1e-2))


@dataclass(frozen=True)
class _Moments:
    """Of one step's privacy loss: mean, standard deviation, and the width of its range."""

    mean: float
    deviation: float
    width: float


def _moments(mechanism: Mechanism) -> _Moments:
    """By quadrature: dp-accounting's own distribution would need the grid that is to be chosen with these."""
    q, sigma = mechanism.sample_rate, mechanism.noise_multiplier
    x = np.linspace(-10 * sigma, 1 + 10 * sigma, 20_001)

    def log_ratio(shift: int) -> Any:
        """Log of the subsampled Gaussian's density over that of N(0, sigma^2)."""
        moved = math.log(q) + (shift * x - 0.5) / sigma**2
        return np.logaddexp(math.log1p(-q), moved) if q < 1 else moved

    upper, lower = log_ratio(1), log_ratio(-1) if mechanism.neighboring == "replace" else 0.0
    log_weights = upper - (x / sigma) ** 2 / 2
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    losses = upper - lower
    mean = float(weights @ losses)
    deviation = math.sqrt(float(weights @ (losses - mean) ** 2))
    return _Moments(mean, deviation, float(losses[-1] - losses[0]))


def _rough_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Epsilon of the training alone as if its privacy loss were normal: neither an upper nor a lower bound."""
    from scipy.special import ndtri

    if not mechanism.steps:
        return 0.0
    step = _moments(mechanism)
    return float(mechanism.steps * step.mean - ndtri(delta) * step.deviation * math.sqrt(mechanism.steps))


def _rough_epsilon_of(event: Any, count: int = 1, sample_rate: float = 1.0) -> float:
    """Likewise of another release, as far as it is a Gaussian one; at delta 1e-5."""
    import dp_accounting as dp

    match event:
        case dp.SelfComposedDpEvent():
            return _rough_epsilon_of(event.event, count * event.count, sample_rate)
        case dp.PoissonSampledDpEvent():
            return _rough_epsilon_of(event.event, count, sample_rate * event.sampling_probability)
        case dp.GaussianDpEvent() if event.noise_multiplier:
            return _rough_epsilon(Mechanism(sample_rate, event.noise_multiplier, count), 1e-5)
    return 0.0


@dataclass(frozen=True)
class _Losses:
    """A privacy loss distribution by dp-accounting, from its two directions of reading."""

    epsilon_at: Callable[[float], float]
    delta_at: Callable[[float], float]

    def epsilon(self, delta: float) -> float:
        """Upper bound on epsilon."""
        try:
            with np.errstate(over="raise"):
                return float(self.epsilon_at(delta))
        except FloatingPointError:
            return self._searched(delta)

    def delta(self, epsilon: float) -> float:
        """Upper bound on delta."""
        return float(self.delta_at(epsilon))

    def _searched(self, delta: float) -> float:
        """dp-accounting divides by exp(-loss), which is 0 from a loss of 709 on. Its delta has no such limit."""
        low, high = 0.0, 1024.0
        while self.delta(high) > delta:
            low, high = high, 2 * high
            if high > _INFINITE_FROM:
                return math.inf
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.delta(middle) > delta else (low, middle)
        return high


def _losses(mechanisms: tuple[Mechanism, ...], interval: float) -> _Losses:
    """Of releasing everything in ``mechanisms``, which share one neighbouring relation."""
    from dp_accounting import NeighboringRelation

    (neighboring,) = {mechanism.neighboring for mechanism in mechanisms}
    # REPLACE_ONE contains the sensitivity of 2: the noise multiplier stays relative to the clip norm.
    relation = {
        "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace": NeighboringRelation.REPLACE_ONE,
    }[neighboring]
    trained = [mechanism for mechanism in mechanisms if mechanism.steps]
    rough = sum(_rough_epsilon(m, 1e-5) for m in trained if m.noise_multiplier)
    rough += sum(_rough_epsilon_of(event) for m in mechanisms for event in m.others)
    if rough > _INFINITE_FROM or not all(m.noise_multiplier for m in trained):
        return _Losses(lambda _: math.inf, lambda _: 1.0)
    interval *= max(1.0, rough / _FINE_UP_TO)
    if any(mechanism.others for mechanism in mechanisms):
        return _with_other_releases(mechanisms, relation, interval)
    return _of_training(trained, relation, min(interval, _needed_interval([_moments(m) for m in trained])))


def _needed_interval(steps: list[_Moments]) -> float:
    """The grid that the narrowest step asks for, as far as the widest can be laid out on it."""
    if not steps:
        return math.inf
    return max(min(s.deviation for s in steps) / _PER_DEVIATION, max(s.width for s in steps) / _MOST_POINTS)


def _of_training(trained: list[Mechanism], relation: Any, interval: float) -> _Losses:
    """Steps of training and nothing else."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    whole = pld.identity(interval)
    for mechanism in trained:
        step = pld.from_gaussian_mechanism(
            mechanism.noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=mechanism.sample_rate,
            neighboring_relation=relation,
        )
        chunks, rest = divmod(mechanism.steps, _CHUNK) if mechanism.steps > 10 * _CHUNK else (0, mechanism.steps)
        if chunks:
            whole = whole.compose(step.self_compose(_CHUNK).self_compose(chunks))
        if rest:
            whole = whole.compose(step.self_compose(rest))
    return _Losses(whole.get_epsilon_for_delta, whole.get_delta_for_epsilon)


def _with_other_releases(mechanisms: tuple[Mechanism, ...], relation: Any, interval: float) -> _Losses:
    """Any events at all, on a grid that suits them too."""
    from dp_accounting import UnsupportedEventError
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(relation, interval)
    for mechanism in mechanisms:
        for event in (*mechanism.others, _training_event(mechanism)):
            try:
                accountant.compose(event)
            except UnsupportedEventError as error:
                raise ConfigError(
                    f"other_releases: {event} cannot be accounted under neighboring={mechanism.neighboring!r} "
                    f"({error}); express it as a GaussianRelease"
                ) from error
    return _Losses(accountant.get_epsilon, accountant.get_delta)


def _training_event(mechanism: Mechanism) -> Any:
    import dp_accounting as dp

    step = dp.PoissonSampledDpEvent(mechanism.sample_rate, dp.GaussianDpEvent(mechanism.noise_multiplier))
    return dp.SelfComposedDpEvent(step, mechanism.steps) if mechanism.steps else dp.NoOpDpEvent()


def rounded_up(epsilon: float, decimals: int) -> float:
    """For people: a rounded promise must not be a better one."""
    return epsilon if math.isinf(epsilon) else math.ceil(epsilon * 10**decimals - 1e-9) / 10**decimals
