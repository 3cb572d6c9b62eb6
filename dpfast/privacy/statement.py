"""The privacy statement: what is promised, about whom, on what conditions, in words and as JSON."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpfast.files import write_atomic, write_json
from dpfast.privacy import accounting, entropy
from dpfast.privacy.accounting import rounded_up
from dpfast.privacy.ledger import Ledger, LedgerContents, library_version
from dpfast.privacy.releases import GaussianRelease
from dpfast.unnoised import UNSAFE_DEBUG

SHOWN = (
    f"{UNSAFE_DEBUG}: un-noised values computed from private data were shown during the training; epsilon covers"
    " neither whoever saw them nor what was chosen by them (when to stop, which settings)."
)

_RELATION = {
    "add_remove": "add/remove: two data sets are neighbours when one has one {example} more than the other",
    "replace": "replace: two data sets are neighbours when one {example} of one is exchanged for another {example}",
}

_QUESTION = {
    "add_remove": "whether one given {example} was used in training",
    "replace": "which of two given {example}s was used in training",
}

_UNIT = (
    "one {example}. A patient (or anybody) with n {example}s in the data has n times epsilon, and a delta that grows "
    "faster than n: the promise to such a patient is weaker"
)

_OUT_OF_SCOPE = (
    (
        "How long the training took, how much memory it used, whether and when it crashed: this depends on the actual "
        "batches. Publish none of it, or times rounded to minutes, as a report of dpfast gives them."
    ),
    "Who could watch the training: the promise is about what is released, not about the computer it ran on.",
    "Whatever else is or was published from the same {example}s, unless it is listed under other releases.",
    "Whoever could break the cipher ChaCha20, of which the noise is made.",
    (
        "The arithmetic of norms and sums, computed in float32: what one {example} weighs may exceed the clip norm by "
        "rounding, and by at most 0.5% where its norm is computed from a Gram matrix."
    ),
)

_NOISE = {
    "gaussian": (
        "Floating-point noise. It is drawn in float64 (Box-Muller on the stream of ChaCha20, keyed by the operating "
        "system) and its mathematics assumes exact real numbers; attacks on the last bits of such noise (Mironov 2012) "
        "are not excluded."
    ),
    "grid": (
        "How near the noise comes to a Gaussian one. Sums and noise are whole multiples of a small number, so that the "
        "last bits tell nothing; the noise is drawn in float64 (Box-Muller on the stream of ChaCha20, keyed by the "
        "operating system) before it is rounded, and ends at 8.49 standard deviations."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """``other``: something else made from the same images. ``epsilon``: of releasing both, at the same delta."""

    other: str
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """Every item of the promise. ``of`` fills it from a ledger: it says what was spent, not what was meant.

    public: what is treated as known to everybody: data set size, class list, preprocessing, test split.
    not_accounted: what was learned from private data outside the accounting: how hyperparameters were chosen.
    membership_accuracy: upper bound on the rate of right guesses about one example; 0.5 is a coin toss.
    compositions: what releasing this beside something else from the same examples costs.
    example: what one example is, in a word whose plural ends in s: "image", "text", "signal".
    """

    subject: str
    example: str
    epsilon: float
    delta: float
    target_epsilon: float | None
    neighboring: str
    unit: str
    membership_accuracy: float
    accountant: str
    sampling: str
    dataset_size: int
    expected_batch_size: float
    sample_rate: float
    steps_planned: int
    steps_charged: int
    noise_multiplier: float
    noise: str
    max_grad_norm: float
    augmult: int
    other_releases: tuple[str, ...]
    compositions: tuple[Composition, ...]
    public: tuple[str, ...]
    not_accounted: tuple[str, ...]
    out_of_scope: tuple[str, ...]
    plan_fingerprint: str
    dpfast: str
    test_entropy: bool
    unsafe_debug: bool

    @classmethod
    def of(
        cls,
        ledger: Ledger | LedgerContents,
        *,
        augmult: int,
        public: Sequence[str],
        not_accounted: Sequence[str],
        example: str = "image",
        subject: str | None = None,
        compositions: Sequence[Composition] = (),
    ) -> "PrivacyStatement":
        """The statement for what has been charged so far; ``public`` and ``not_accounted`` are sentences.

        subject: what it is about; by default the model and every ``example`` sampled from it.
        """
        plan, charged = ledger.plan, ledger.charged_steps
        return cls(
            subject=subject or f"the model and every {example} sampled from it",
            example=example,
            # A plan without noise promises nothing, not even before its first step.
            epsilon=plan.epsilon(charged) if plan.is_private else math.inf,
            delta=plan.target_delta,
            target_epsilon=plan.target_epsilon,
            neighboring=plan.neighboring,
            unit=_UNIT.format(example=example),
            membership_accuracy=plan.membership_accuracy(charged) if plan.is_private else 1.0,
            accountant=accounting.accountant_name(),
            sampling=f"Poisson: a step takes each {example} independently, with chance {plan.sample_rate:.6g}",
            dataset_size=plan.dataset_size,
            expected_batch_size=plan.expected_batch_size,
            sample_rate=plan.sample_rate,
            steps_planned=plan.steps,
            steps_charged=charged,
            noise_multiplier=plan.noise_multiplier,
            noise=plan.noise,
            max_grad_norm=plan.max_grad_norm,
            augmult=augmult,
            other_releases=tuple(_described(release) for release in plan.other_releases),
            compositions=tuple(compositions),
            public=tuple(public),
            not_accounted=tuple(not_accounted),
            out_of_scope=(*(item.format(example=example) for item in _OUT_OF_SCOPE), _NOISE[plan.noise]),
            plan_fingerprint=plan.fingerprint(),
            dpfast=library_version(),
            test_entropy=ledger.test_entropy or entropy.is_injected(),
            unsafe_debug=ledger.unsafe_debug,
        )

    @property
    def is_private(self) -> bool:
        """False without noise and under test entropy. With ``unsafe_debug``: against who saw the release alone."""
        return math.isfinite(self.epsilon) and not self.test_entropy

    def to_dict(self) -> dict[str, Any]:
        """JSON form: every field, infinite epsilons as "inf", and ``verdict``, the first thing to read."""
        values = {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}
        verdict = f"{SHOWN} Apart from that: {self._verdict()}" if self.unsafe_debug else self._verdict()
        return {"verdict": verdict, **values}

    def text(self) -> str:
        """The statement for a person, as Markdown."""
        sections = (
            ("Privacy statement", f"**{SHOWN}**\n\n{self._summary()}" if self.unsafe_debug else self._summary()),
            ("Whom it protects: the unit", f"The unit of protection is {self.unit}."),
            ("The figures", self._figures()),
            ("Treated as public, and so not protected", _bullets(self.public)),
            ("Not accounted", _bullets(self.not_accounted)),
            ("Outside the promise", _bullets(self.out_of_scope)),
        )
        return "\n".join(f"{'#' if i == 0 else '##'} {title}\n\n{body}\n" for i, (title, body) in enumerate(sections))

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``privacy.json`` and ``PRIVACY.md`` into ``folder``; FileError when that fails."""
        write_json(Path(folder) / "privacy.json", self.to_dict())
        write_atomic(Path(folder) / "PRIVACY.md", self.text())

    def _verdict(self) -> str:
        if self.test_entropy:
            return f"{entropy.TEST_ENTROPY}. NOT PRIVATE"
        if math.isinf(self.epsilon):
            return "NOT PRIVATE"
        return f"differentially private with epsilon = {_up(self.epsilon)}, delta = {self.delta:g}, per {self.example}"

    def _summary(self) -> str:
        subject = f"{self.subject[0].upper()}{self.subject[1:]}"
        if self.is_private:
            alone = f"**{subject}: {self._verdict()}.**"
            return "\n\n".join([alone, *(self._together(one) for one in self.compositions), self._meaning()])
        reason = (
            "The random numbers behind it can be repeated by whoever knows the seed of a test."
            if self.test_entropy
            else "Gradients were clipped, but there was no noise, or too little to promise anything."
        )
        return (
            f"**{self._verdict()}.** {reason} {subject} may reveal the training {self.example}s. "
            f"Treat this release as you treat the private {self.example}s themselves."
        )

    def _together(self, composition: Composition) -> str:
        return (
            f"**Released together with {composition.other}, from the same {self.example}s: epsilon = "
            f"{_up(composition.epsilon)}, delta = {self.delta:g}, in all.** What else is said here is for those who "
            "see only this."
        )

    def _meaning(self) -> str:
        return (
            "What this means: there is a limit to how well anybody can tell "
            f"{_QUESTION[self.neighboring].format(example=self.example)}. "
            f"{self._odds()} This holds whatever else somebody knows or computes, for every use made of what "
            "was released, now and later. It does not mean that nothing can be learned about people in general: "
            f"what is true of the whole group, with or without any one {self.example}, is what a useful model"
            " learns.\n\n"
            f"Epsilon says how much one {self.example} can change what is released: 0 is not at all, and the larger it "
            f"is, the weaker the promise. Delta ({self.delta:g}) is, roughly, the chance that it fails."
        )

    def _odds(self) -> str:
        percent = math.ceil(100 * self.membership_accuracy)
        if percent >= 100:
            return "At an epsilon as large as this one, however, no limit on right guesses can be proven."
        return (
            f"Somebody who has to guess it, when both answers are equally likely, is right at most {percent} "
            f"times in 100, even if all other {self.example}s are known; tossing a coin is right 50 times."
        )

    def _figures(self) -> str:
        target = "" if self.target_epsilon is None else f"; the target was {self.target_epsilon:g}"
        spent = f"an upper bound, for the {self.steps_charged} steps spent{target}"
        rows = {
            "epsilon": f"{_up(self.epsilon)} ({spent})",
            "delta": f"{self.delta:g} (1 / number of {self.example}s is {1 / self.dataset_size:.2g})",
            "neighbouring relation": _RELATION[self.neighboring].format(example=self.example),
            "accountant": self.accountant,
            "sampling": self.sampling,
            "batch": f"{self.expected_batch_size:g} of {self.dataset_size} {self.example}s on average",
            "steps": f"{self.steps_charged} spent of {self.steps_planned} planned",
            "noise multiplier": f"{self.noise_multiplier:g} (noise standard deviation / clip norm)",
            "noise": {"gaussian": "Gaussian, in float64", "grid": "Gaussian, rounded to a grid"}[self.noise],
            "clip norm": f"{self.max_grad_norm:g} (the most that one {self.example} can weigh in a step)",
            "augmentations": f"{self.augmult} per {self.example} and step, averaged into one gradient before clipping",
            "other releases": "; ".join(self.other_releases) or "none",
            "plan": self.plan_fingerprint,
            "made with": f"dpfast {self.dpfast}",
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items) if items else "- nothing was named"


def _described(release: Any) -> str:
    if isinstance(release, GaussianRelease):
        return f"{release.description} ({release.count} x, noise multiplier {release.noise_multiplier:g})"
    return str(release)


def _up(epsilon: float) -> str:
    """Epsilon to three decimals, rounded up: a rounded promise must not be a better one."""
    return "infinite" if math.isinf(epsilon) else f"{rounded_up(epsilon, 3):g}"
