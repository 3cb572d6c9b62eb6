"""Plan: everything that moves epsilon, in one value that is checked once and never changes."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dpfast.errors import ConfigError
from dpfast.privacy import accounting, releases
from dpfast.privacy.accounting import Mechanism, Neighboring

Noise = Literal["gaussian", "grid"]

_GRID_BITS = 30  # float64 holds sums of 2^22 standard deviations on such a grid


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The privacy side of a training run.

    dataset_size: images in the private training set (treated as public knowledge).
    expected_batch_size: each step takes each image with probability expected_batch_size / dataset_size.
    max_grad_norm: C, the most that one image's gradient (mean over its augmentations) may weigh, as an L2
        norm.
    steps: private steps; none is taken beyond them.
    target_delta: chance of failure that is tolerated; below 1 / dataset_size.
    target_epsilon or noise_multiplier: exactly one. The noise has standard deviation noise_multiplier * C per
        coordinate of the summed gradient. ``target_epsilon=math.inf`` clips without noise and gives no
        privacy.
    other_releases: ``GaussianRelease`` or dp-accounting events from the same data; their cost comes first.
    neighboring: "add_remove" (one image more or fewer) or "replace" (one image exchanged for another).
    noise: "gaussian", or "grid": sums and noise are rounded to multiples of a power of two before they are added, so
        that the last bits of what is released tell nothing of the sum's (``noise_on``).

    Guarantee: the calibrated ``noise_multiplier`` is such that ``epsilon()``, as reported, is at most
    ``target_epsilon``, provided that every step sums clipped gradients of a fresh Poisson sample
    (``poisson_sample(dataset_size, sample_rate)``) through ``DPOptimizer``.

    Raises ConfigError that names every wrong value. Warns when target_delta is not below 1 / dataset_size.
    """

    dataset_size: int
    expected_batch_size: float
    max_grad_norm: float
    steps: int
    target_delta: float
    target_epsilon: float | None = None
    noise_multiplier: float = None  # type: ignore[assignment]  # always a float once the plan is made
    other_releases: Sequence[Any] = ()
    neighboring: Neighboring = "add_remove"
    noise: Noise = "gaussian"

    def __post_init__(self) -> None:
        object.__setattr__(self, "other_releases", tuple(self.other_releases))
        problems = _problems(self)
        if problems:
            raise ConfigError("this Plan cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
        if self.target_delta >= 1 / self.dataset_size:
            warnings.warn(
                f"target_delta={self.target_delta:g} is not below "
                f"1/dataset_size={1 / self.dataset_size:.3g}: a mechanism that publishes one random image in "
                "full would satisfy it; choose a smaller delta",
                stacklevel=3,
            )
        object.__setattr__(self, "noise_multiplier", self._resolved_noise_multiplier())
        if self.other_releases:
            self.epsilon(0)  # refuses now what the accountant would refuse at the first report

    def _resolved_noise_multiplier(self) -> float:
        if self.target_epsilon is None:
            return float(self.noise_multiplier)
        if math.isinf(self.target_epsilon):
            return 0.0
        return accounting.calibrate(self.mechanism(self.steps, 1.0), self.target_epsilon, self.target_delta)

    @property
    def sample_rate(self) -> float:
        """q, the probability that a given image takes part in a given step."""
        return self.expected_batch_size / self.dataset_size

    @property
    def is_private(self) -> bool:
        """False for ``target_epsilon=math.inf``."""
        return self.noise_multiplier > 0

    def noise_on(self, numbers: int) -> tuple[float, float]:
        """Standard deviation of the noise on each of the ``numbers`` that are trained, and the grid (0: none) to which
        they and their sum are rounded.

        Floating-point noise has gaps that depend on what it is added to (Mironov 2012). On a grid of spacing s, 2^-30
        of the deviation or less, all is exact: sum and noise are whole multiples of it. Rounding moves the sums of two
        neighbouring data sets apart by at most ``s sqrt(numbers)`` more, so that the noise is for a clip norm of ``C +
        s sqrt(numbers)``. Since the sum lies on the grid, rounding the noise is rounding the result, which the
        accounting of the Gaussian mechanism covers (Canonne, Kamath, Steinke, arXiv 2004.00010, have a noise that is
        discrete from the start; what it would cost in epsilon over many sampled steps no accountant computes).
        """
        scale = self.noise_multiplier * self.max_grad_norm
        if self.noise == "gaussian" or scale == 0:
            return scale, 0.0
        grid = 2.0 ** (math.floor(math.log2(scale)) - _GRID_BITS)
        return self.noise_multiplier * (self.max_grad_norm + grid * math.sqrt(numbers)), grid

    def epsilon(self, steps: int | None = None) -> float:
        """Epsilon at ``target_delta`` after ``steps`` steps (all of them by default), other releases
        included.
        """
        return accounting.epsilon(self.mechanism(steps), self.target_delta)

    def epsilon_curve(self, points: int = 20, *, early: bool = False) -> list[tuple[int, float]]:
        """(step, epsilon) at ``points`` or fewer steps, from 0 to the last, never decreasing.

        Evenly spaced or, with ``early``, closer together at first, where epsilon grows fastest. All but the last are
        taken on the calibration grid, which overstates by about 1e-3 and is ten times faster.
        """
        shares = [(i / max(points - 1, 1)) ** (2 if early else 1) for i in range(points)]
        early_ones = {1, 2} if early else set()
        steps = sorted(s for s in {round(share * self.steps) for share in shares} | early_ones if s < self.steps)
        last = self.epsilon()
        curve = [(s, min(last, self._coarse_epsilon(s))) for s in steps]
        return [*curve, (self.steps, last)]

    def membership_accuracy(self, steps: int | None = None) -> float:
        """Upper bound on the rate of right guesses whether one given image was used (0.5 is a coin toss)."""
        return accounting.membership_accuracy(self.mechanism(steps))

    def fingerprint(self) -> str:
        """SHA-256 of everything in the plan, hexadecimal: two plans agree in it only if they are the same."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON form (an infinite epsilon is the string "inf"); ``from_dict`` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["other_releases"] = [releases.to_dict(release) for release in self.other_releases]
        if self.noise == "gaussian":
            del values["noise"]  # as plans were written before there was another
        if self.target_epsilon is not None and math.isinf(self.target_epsilon):
            values["target_epsilon"] = "inf"
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan that ``to_dict`` described, with the noise multiplier it says: nothing is calibrated
        again.
        """
        target = values["target_epsilon"]
        given = {**values, "other_releases": [releases.from_dict(r) for r in values["other_releases"]]}
        if target == "inf":
            return cls(**{**given, "target_epsilon": math.inf, "noise_multiplier": None})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever made the plan was warned
            plan = cls(**{**given, "target_epsilon": None})
        object.__setattr__(plan, "target_epsilon", target)
        return plan

    def _coarse_epsilon(self, steps: int) -> float:
        return accounting.epsilon(self.mechanism(steps), self.target_delta, accounting.CALIBRATE_INTERVAL)

    def mechanism(self, steps: int | None = None, noise_multiplier: float | None = None) -> Mechanism:
        """What the accountant is told of the first ``steps`` steps (all of them by default)."""
        return Mechanism(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier if noise_multiplier is None else noise_multiplier,
            steps=self.steps if steps is None else steps,
            others=tuple(releases.to_event(release) for release in self.other_releases),
            neighboring=self.neighboring,
        )


def composed_epsilon(parts: Sequence[tuple[Plan, int]], *, target_delta: float) -> float:
    """Epsilon at ``target_delta`` of releasing everything: each plan's first so-many steps, on the same data.

    Raises ConfigError when the plans disagree on the neighbouring relation.
    """
    if len({plan.neighboring for plan, _ in parts}) != 1:
        raise ConfigError("composed_epsilon: expected one or more plans with one neighbouring relation between them")
    return accounting.composed_epsilon(tuple(plan.mechanism(steps) for plan, steps in parts), target_delta)


def _problems(plan: Plan) -> list[str]:
    """Every wrong value with its cure."""
    found = []

    def check(good: bool, name: str, expected: str) -> None:
        if not good:
            found.append(f"{name}={getattr(plan, name)!r}: expected {expected}")

    n, batch = plan.dataset_size, plan.expected_batch_size
    check(_whole(n) and n >= 1, "dataset_size", "a whole number of images, 1 or more: len(dataset)")
    check(_number(batch) and 0 < batch < math.inf, "expected_batch_size", "a positive number of images")
    if _number(n) and _number(batch) and batch > n >= 1:
        check(False, "expected_batch_size", f"at most dataset_size={n}; lower it, an image is taken once a step")
    check(
        _number(plan.max_grad_norm) and 0 < plan.max_grad_norm < math.inf,
        "max_grad_norm",
        "a positive number",
    )
    check(_whole(plan.steps) and plan.steps >= 1, "steps", "a whole number, 1 or more")
    check(
        _number(plan.target_delta) and 0 < plan.target_delta < 1,
        "target_delta",
        "a number between 0 and 1 (both excluded), well below 1/dataset_size, such as 1e-5",
    )
    check(plan.neighboring in get_args(Neighboring), "neighboring", '"add_remove" or "replace"')
    check(plan.noise in get_args(Noise), "noise", '"gaussian" or "grid"')
    return found + _noise_problems(plan)


def _noise_problems(plan: Plan) -> list[str]:
    target, sigma = plan.target_epsilon, plan.noise_multiplier
    if (target is None) == (sigma is None):
        came = "neither" if target is None else f"target_epsilon={target!r} and noise_multiplier={sigma!r}"
        wanted = "expected exactly one of target_epsilon and noise_multiplier"
        cure = "drop or add one (dataclasses.replace of a calibrated plan: noise_multiplier=None calibrates anew)"
        return [f"{wanted}, got {came}; {cure}"]
    if target is not None and not (_number(target) and (0 < target <= 1e4 or target == math.inf)):
        return [f"target_epsilon={target!r}: expected a number above 0, up to 1e4, or math.inf for no privacy"]
    if target is None and not (_number(sigma) and 0 < sigma < math.inf):
        return [f"noise_multiplier={sigma!r}: expected a positive number; no noise is target_epsilon=math.inf"]
    return []


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
