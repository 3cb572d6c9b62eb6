"""Noise, Poisson sampling, accounting, the ledger, and the Plan that couples them."""

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
    "Plan",
    "PrivacyStatement",
    "composed_epsilon",
    "poisson_sample",
    "random_bytes",
    "read_ledger",
    "standard_normal",
    "uniform",
]
