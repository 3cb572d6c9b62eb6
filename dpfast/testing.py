"""For tests only: private randomness that can be repeated."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dpfast.privacy import entropy


@contextmanager
def injected_entropy(seed: int) -> Iterator[None]:
    """Replace the operating system's entropy by a stream that ``seed`` determines, inside the ``with`` block.

    Whoever knows the seed can subtract the noise: there is NO privacy. Ledger lines and privacy statements
    written inside say "TEST ENTROPY: no guarantee".
    """
    outside, entropy.source = entropy.source, np.random.Generator(np.random.Philox(seed)).bytes
    try:
        yield
    finally:
        entropy.source = outside
