"""Lower bounds on epsilon from what an attack gets right: they must lie below what the accountant says.

Two worlds: an attack scores releases of a world with an example and of one without it; how often either lies beyond a
threshold bounds epsilon (Nasr et al., arXiv 2101.04535), at exact limits of confidence (Clopper and Pearson 1934). One
run: an attack guesses of many examples whether each took part in the one release there is (Steinke, Nasr, Jagielski,
arXiv 2305.08846).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpfast.errors import ConfigError

_MOST = 200.0  # epsilon beyond which nothing is told apart in float64
_FEWEST = 20  # scores of a world, half of which choose the threshold

Scores = NDArray[np.float64]
Counts = int | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Whatever was attacked: with probability ``confidence`` it is (epsilon', delta)-private for no epsilon' below
    ``epsilon``.
    """

    epsilon: float
    delta: float
    confidence: float


def rate_limits(hits: Counts, trials: Counts, *, confidence: float) -> tuple[Scores, Scores]:
    """Of rates of which ``hits`` of ``trials`` were seen: each lies below the first number with probability at most
    ``1 - confidence``, and above the second likewise (Clopper and Pearson 1934).
    """
    from scipy.stats import beta

    hits = np.asarray(hits)
    with np.errstate(invalid="ignore"):  # beta knows no limit where nothing, or everything, was a hit
        low = np.where(hits == 0, 0.0, beta.ppf(1 - confidence, hits, trials - hits + 1))
        high = np.where(hits == trials, 1.0, beta.ppf(confidence, hits + 1, trials - hits))
    return low, high


def two_worlds_bound(
    absent: Sequence[float], present: Sequence[float], *, delta: float, confidence: float = 0.95
) -> LowerBound:
    """From scores of releases without an example and of releases with it, each score of a release of its own.

    Every other score chooses an event, "above" some threshold or not; the rest says how likely it is in either world:
    the bound holds for whatever scores an attack makes, provided that no score depends on another. Scores are larger
    with the example.

    Raises ConfigError for fewer than 20 scores of a world, or scores that are not finite.
    """
    _check(delta, confidence)
    worlds = [np.asarray(scores, float) for scores in (absent, present)]
    if min(map(len, worlds)) < _FEWEST or not all(np.isfinite(scores).all() for scores in worlds):
        raise ConfigError(f"two_worlds_bound: expected {_FEWEST} finite scores or more of each world")
    each = (1 + confidence) / 2  # two rates, each at half the risk
    chosen, counted = ([np.sort(scores[part::2]) for scores in worlds] for part in (0, 1))
    levels = np.unique(np.concatenate(chosen))
    by_event = _epsilons(chosen, levels, delta, each)
    above, best = np.unravel_index(int(by_event.argmax()), by_event.shape)
    epsilon = float(_epsilons(counted, levels[best : best + 1], delta, each)[above, 0])
    return LowerBound(epsilon=max(0.0, epsilon), delta=delta, confidence=confidence)


def one_run_bound(
    scores: Sequence[float],
    included: Sequence[bool],
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[int] = (),
) -> LowerBound:
    """From scores of m examples of one release, each of which took part by a fair coin of its own (``included``).

    Of the examples with the largest scores it is guessed that they took part, of as many with the smallest that they
    did not, of others nothing. guesses: how many to guess in all, from few to all by default; several are tried at a
    share of the risk each. Theorem 5.2 of Steinke et al. for neighbours that differ by an example more or less.

    Raises ConfigError for scores that are not finite, or lists of different lengths.
    """
    _check(delta, confidence)
    values, truth = np.asarray(scores, float), np.asarray(included, bool)
    if values.shape != truth.shape or values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ConfigError(
            "one_run_bound: expected a finite score and whether it took part for each of two examples or more"
        )
    m = len(values)
    tried = tuple(guesses) or tuple(sorted({2 * max(1, m // (2 * share)) for share in (50, 20, 10, 5, 2, 1)}))
    order, risk = values.argsort(kind="stable"), (1 - confidence) / len(tried)
    found = []
    for count in tried:
        half = count // 2
        right = int((~truth[order[:half]]).sum() + truth[order[m - half :]].sum())
        found.append(_one_run_epsilon(m, 2 * half, right, delta, risk))
    return LowerBound(epsilon=max(found), delta=delta, confidence=confidence)


def one_run_chance(examples: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most likely that an (epsilon, delta)-private release lets ``right`` or more of ``guesses`` be right.

    ``P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i``, W binomial of r trials with ``e^epsilon / (1 + e^epsilon)``.
    """
    from scipy.stats import binom

    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, rate))
    counts = np.arange(1, max(2, right + 1))
    below = np.cumsum(binom.pmf(right - counts, guesses, rate)) / counts
    return min(1.0, tail + 2 * examples * delta * float(below.max(initial=0.0)))


def _one_run_epsilon(examples: int, guesses: int, right: int, delta: float, risk: float) -> float:
    """The largest epsilon at which so many right guesses are no likelier than ``risk``."""
    if one_run_chance(examples, guesses, right, 0.0, delta) > risk:
        return 0.0
    low, high = 0.0, _MOST
    while high - low > 1e-4:
        middle = (low + high) / 2
        below = one_run_chance(examples, guesses, right, middle, delta) <= risk
        low, high = (middle, high) if below else (low, middle)
    return low


def _epsilons(worlds: Sequence[Scores], thresholds: Scores, delta: float, confidence: float) -> Scores:
    """``[2, thresholds]``: of the events that a score is not above it, likelier without the example, and above it."""
    within = [np.searchsorted(scores, thresholds, side="right") for scores in worlds]
    beyond = [len(scores) - count for scores, count in zip(worlds, within, strict=True)]
    sizes = np.array([[len(scores)] for scores in worlds])
    least, _ = rate_limits(np.stack([within[0], beyond[1]]), sizes, confidence=confidence)
    _, most = rate_limits(np.stack([within[1], beyond[0]]), sizes[::-1], confidence=confidence)
    return np.log(np.maximum(least - delta, np.finfo(float).tiny) / most)


def _check(delta: float, confidence: float) -> None:
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise ConfigError(f"delta={delta}, confidence={confidence}: expected 0 <= delta < 1 and 0 < confidence < 1")
