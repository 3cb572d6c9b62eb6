"""Noise, Poisson sampling, accounting, the ledger, the Plan that couples them, and a choice among settings."""

from dpfast.privacy.choice import NoisedChoice, choice_release, noised_choice
from dpfast.privacy.entropy import random_bytes, standard_normal, uniform
from dpfast.privacy.ledger import Ledger, LedgerContents, read_ledger
from dpfast.privacy.plan import Plan, composed_epsilon
from dpfast.privacy.releases import GaussianRelease
from dpfast.privacy.sampling import poisson_sample
from dpfast.privacy.statement import PrivacyStatement

__all__ = [
    "GaussianRelease",
    "Ledger",
    "LedgerContents",
    "NoisedChoice",
    "Plan",
    "PrivacyStatement",
    "choice_release",
    "composed_epsilon",
    "noised_choice",
    "poisson_sample",
    "random_bytes",
    "read_ledger",
    "standard_normal",
    "uniform",
]
