"""Epsilon of Poisson-subsampled Gaussian training, through dp-accounting. Nothing is derived anew here.

Reported figures come from privacy loss distributions (PLD, Koskela et al. 2020; Doroshenko et al. 2022),
whose discretisation only ever overstates epsilon. Renyi accounting (RDP) serves as a first guess, never as a
result. dp-accounting is imported on first use: that takes seconds.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from dpfast.errors import ConfigError

Neighboring = Literal["add_remove", "replace"]

REPORT_INTERVAL = 1e-4
CALIBRATE_INTERVAL = 1e-3

# Above this epsilon the grid is widened in proportion: it would grow with epsilon and say no more.
_FINE_UP_TO = 50.0
# Above this one infinity is reported: a true bound, for a promise that is worth nothing.
_INFINITE_FROM = 1e5
# No use of training needs more noise; what is still above the target here is not the training's doing.
_MAX_SIGMA = 1e6
# Calibrated multipliers are rounded up to this, so that a platform's last bits do not make it another plan.
_SIGMA_STEP = 1e-4
# For guesses only. Integer orders have a closed form; others fail to converge at large sampling rates.
_RDP_ORDERS = (*range(2, 64), 128, 256, 512, 1024)


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

    grid = f"grid {REPORT_INTERVAL:g} up to epsilon {_FINE_UP_TO:g}, wider beyond"
    return f"privacy loss distributions (dp-accounting {version('dp-accounting')}), {grid}"


@lru_cache(maxsize=1024)
def epsilon(mechanism: Mechanism, delta: float, interval: float = REPORT_INTERVAL) -> float:
    """Upper bound on epsilon at ``delta`` of releasing everything in ``mechanism``; inf without noise."""
    return float(_accountant((mechanism,), interval).get_epsilon(delta))


def composed_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Upper bound on epsilon at ``delta`` of releasing all results of ``mechanisms`` from the same data."""
    return float(_accountant(mechanisms, REPORT_INTERVAL).get_epsilon(delta))


def membership_accuracy(mechanism: Mechanism) -> float:
    """Upper bound on how often anybody guesses rightly whether one given image was used, 0.5 being a coin.

    (1 + delta(epsilon = 0)) / 2 of the whole privacy curve: the total variation bound of hypothesis testing
    (Wasserman and Zhou 2010; Kairouz et al. 2015), for an image that was used with probability one half.
    """
    return min(1.0, 0.5 + 0.5 * float(_accountant((mechanism,), CALIBRATE_INTERVAL).get_delta(0.0)))


@lru_cache(maxsize=256)
def calibrate(mechanism: Mechanism, target_epsilon: float, delta: float) -> float:
    """The least noise multiplier, rounded up to 1e-4, whose *reported* epsilon is at most ``target_epsilon``.

    The multiplier in ``mechanism`` is ignored. Raises ConfigError, with the best epsilon that can be reached,
    when no amount of noise suffices.
    """
    best = epsilon(replace(mechanism, noise_multiplier=_MAX_SIGMA), delta, CALIBRATE_INTERVAL)
    if best >= target_epsilon:
        cure = (
            "that is what the other releases cost: raise the target or release less"
            if mechanism.others
            else "no accountant resolves so small a delta: raise target_delta"
        )
        raise ConfigError(
            f"target_epsilon={target_epsilon:g} cannot be reached at target_delta={delta:g}: with unlimited "
            f"noise epsilon is still {best:.4g}; {cure}"
        )
    sigma = _round_up(_solve(mechanism, target_epsilon, delta))
    while epsilon(replace(mechanism, noise_multiplier=sigma), delta) > target_epsilon:
        sigma = _round_up(sigma * 1.0005)
    return sigma


def _round_up(sigma: float) -> float:
    return round(math.ceil(sigma / _SIGMA_STEP) * _SIGMA_STEP, 10)


def _solve(mechanism: Mechanism, target: float, delta: float) -> float:
    """The multiplier whose epsilon on the calibration grid is ``target``, to 1e-5 relative."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        tried = replace(mechanism, noise_multiplier=math.exp(log_sigma))
        return epsilon(tried, delta, CALIBRATE_INTERVAL) - target

    high = math.log(_rdp_guess(mechanism, target, delta))
    while excess(high) > 0:
        high = min(high + 0.3, math.log(_MAX_SIGMA))
    low = high - 0.3
    while excess(low) <= 0:
        low -= 0.3
    return math.exp(brentq(excess, low, high, xtol=1e-5))


def _rdp_guess(mechanism: Mechanism, target: float, delta: float) -> float:
    from scipy.optimize import brentq

    def gap(log_sigma: float) -> float:
        rough = _rdp_epsilon(replace(mechanism, noise_multiplier=math.exp(log_sigma)), delta)
        return math.log(max(rough, 1e-12) / target)

    low, high = math.log(1e-3), math.log(_MAX_SIGMA)
    if gap(low) <= 0:
        return 1e-3
    return math.exp(brentq(gap, low, high, xtol=1e-2)) if gap(high) < 0 else _MAX_SIGMA


def _rdp_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Rough epsilon of the training alone; exchanging an image counts as a sensitivity of 2."""
    from dp_accounting.rdp import RdpAccountant

    if mechanism.neighboring == "replace":
        mechanism = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    return float(RdpAccountant(_RDP_ORDERS).compose(_training_event(mechanism)).get_epsilon(delta))


def _accountant(mechanisms: tuple[Mechanism, ...], interval: float) -> Any:
    """A PLD accountant that holds every event of ``mechanisms``, which share one neighbouring relation."""
    from dp_accounting import NeighboringRelation, NonPrivateDpEvent, UnsupportedEventError
    from dp_accounting.pld import PLDAccountant

    (neighboring,) = {mechanism.neighboring for mechanism in mechanisms}
    # REPLACE_ONE contains the sensitivity of 2: the noise multiplier stays relative to the clip norm.
    relation = {
        "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace": NeighboringRelation.REPLACE_ONE,
    }[neighboring]
    rough = sum(_rdp_epsilon(m, 1e-5) for m in mechanisms if m.steps and m.noise_multiplier)
    if rough > _INFINITE_FROM:
        return PLDAccountant(relation).compose(NonPrivateDpEvent())
    accountant = PLDAccountant(relation, interval * max(1.0, rough / _FINE_UP_TO))
    for mechanism in mechanisms:
        for event in (*mechanism.others, _training_event(mechanism)):
            try:
                accountant.compose(event)
            except UnsupportedEventError as error:
                raise ConfigError(
                    f"other_releases: {event} cannot be accounted under neighboring={neighboring!r} "
                    f"({error}); express it as a GaussianRelease"
                ) from error
    return accountant


def _training_event(mechanism: Mechanism) -> Any:
    import dp_accounting as dp

    step = dp.PoissonSampledDpEvent(mechanism.sample_rate, dp.GaussianDpEvent(mechanism.noise_multiplier))
    return dp.SelfComposedDpEvent(step, mechanism.steps) if mechanism.steps else dp.NoOpDpEvent()


def rounded_up(epsilon: float, decimals: int) -> float:
    """For people: a rounded promise must not be a better one."""
    return epsilon if math.isinf(epsilon) else math.ceil(epsilon * 10**decimals - 1e-9) / 10**decimals
