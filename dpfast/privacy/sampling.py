"""Poisson sampling: the sampling that the accountant assumes, from the same entropy as the noise."""

import numpy as np
import torch

from dpfast.errors import ConfigError
from dpfast.privacy import entropy


def poisson_sample(dataset_size: int, sample_rate: float) -> torch.Tensor:
    """Ascending indices, int64 of varying length (possibly 0): each example is in with probability
    ``sample_rate``.

    Guarantee: the decisions are independent of each other, of the data and of every earlier call, as the
    accounting of ``Plan`` requires. A shuffled or fixed-size batch does not satisfy it.
    """
    if dataset_size < 1 or not 0.0 < sample_rate <= 1.0:
        raise ConfigError(
            "poisson_sample: expected dataset_size >= 1 and 0 < sample_rate <= 1, "
            f"got {dataset_size} and {sample_rate}; pass len(dataset) and plan.sample_rate"
        )
    return torch.from_numpy(np.flatnonzero(entropy.uniform(dataset_size) < sample_rate))
