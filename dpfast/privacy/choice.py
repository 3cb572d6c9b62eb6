"""Choosing among settings (hyperparameters) by scores on private images, as one more Gaussian release.

The m numbers of private images that m classifiers label correctly are released with Gaussian noise; the largest wins.

    release = choice_release(settings=12, sigma=40.0)
    plan = Plan(..., other_releases=[release])     # the training's noise is calibrated around its cost
    choice = noised_choice(counts_correct, sigma=40.0, ledger=ledger)  # a ledger of that plan
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.errors import ConfigError
from dpfast.privacy import entropy
from dpfast.privacy.ledger import Ledger
from dpfast.privacy.releases import GaussianRelease

CHOICE = "noised choice among settings"


@dataclass(frozen=True, kw_only=True)
class NoisedChoice:
    """index: of the setting with the largest noised count; noised_counts: of all. Both may be published."""

    index: int
    noised_counts: tuple[float, ...]


def choice_release(*, settings: int, sigma: float, description: str = CHOICE) -> GaussianRelease:
    """One noised choice, for ``Plan(other_releases=[...])``.

    settings: m, how many are chosen among. sigma: standard deviation of the noise on each count, in images. One image
    moves each count by at most 1, hence the vector of them by at most sqrt(m) (L2): the noise multiplier is
    ``sigma / sqrt(m)``.
    """
    if settings < 2 or not 0 < sigma < math.inf:
        raise ConfigError(
            f"choice_release(settings={settings}, sigma={sigma}): expected two settings or more, and a positive number"
        )
    return GaussianRelease(description=description, noise_multiplier=sigma / math.sqrt(settings))


def noised_choice(counts_correct: Tensor, *, sigma: float, ledger: Ledger, description: str = CHOICE) -> NoisedChoice:
    """The setting whose count is largest after Gaussian noise from ``dpfast.privacy.entropy``.

    counts_correct: int64 ``[m]``, how many private images each of m classifiers labels correctly, the same images for
    all. sigma, description: as given to ``choice_release``.

    Guarantee: what is returned is the Gaussian mechanism on ``counts_correct``, whose L2 sensitivity is sqrt(m) whether
    neighbouring data sets differ by an image more or an image exchanged. It holds if the classifiers themselves come
    from public data and from releases of the same plan (synthetic images, say), and from nothing else. ``ledger``
    charges the draw before the noise is drawn; if a crash loses the result, the draw is spent.

    Raises PrivacyError, and draws nothing, when the ledger's plan does not list the release, and BudgetExhausted when
    it has been drawn.
    """
    if counts_correct.dtype != torch.int64 or counts_correct.ndim != 1:
        raise ConfigError(
            "counts_correct: expected whole numbers of images, int64 [settings], got"
            f" {counts_correct.dtype} {tuple(counts_correct.shape)}"
        )
    ledger.charge_release(choice_release(settings=len(counts_correct), sigma=sigma, description=description))
    noised = entropy.noised(counts_correct.double(), sigma, 1.0)
    return NoisedChoice(index=int(noised.argmax()), noised_counts=tuple(noised.tolist()))
