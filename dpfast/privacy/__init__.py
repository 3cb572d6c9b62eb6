"""Noise, Poisson sampling, accounting, the ledger, and the Plan that couples them."""

from dpfast.privacy.entropy import random_bytes as random_bytes
from dpfast.privacy.entropy import standard_normal as standard_normal
from dpfast.privacy.entropy import uniform as uniform
from dpfast.privacy.ledger import Ledger as Ledger
from dpfast.privacy.ledger import LedgerContents as LedgerContents
from dpfast.privacy.ledger import read_ledger as read_ledger
from dpfast.privacy.plan import Plan as Plan
from dpfast.privacy.plan import composed_epsilon as composed_epsilon
from dpfast.privacy.releases import GaussianRelease as GaussianRelease
from dpfast.privacy.sampling import poisson_sample as poisson_sample
from dpfast.privacy.statement import PrivacyStatement as PrivacyStatement
