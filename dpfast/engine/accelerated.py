"""What ``accelerate.Accelerator.prepare`` makes of an optimizer and a data loader, known without importing it.

``make_private`` takes what ``prepare`` returned, and comes after it: the model is on its device then and computes in
its precision, and the private loader moves batches as the prepared one does. The other way round, accelerate would
make a loader of its own from the private one's pieces, which reads ahead of the batch that is trained on.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from dpfast.errors import ConfigError


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's, or ``optimizer`` itself.

    Raises ConfigError for one that unscales gradients (float16): they would be clipped scaled.
    """
    if not _is("AcceleratedOptimizer", optimizer):
        return optimizer
    wrapped: Any = optimizer
    if wrapped.scaler is not None:
        raise ConfigError(
            'mixed_precision="fp16" scales losses, whose gradients would be clipped as they are scaled: use'
            ' Accelerator(mixed_precision="bf16"), or "no"'
        )
    inner: torch.optim.Optimizer = wrapped.optimizer
    return inner


def batches_of_step(optimizer: torch.optim.Optimizer) -> int:
    """``gradient_accumulation_steps`` of the ``Accelerator`` that prepared the optimizer; 1 without."""
    wrapped: Any = optimizer
    return int(wrapped.gradient_state.num_steps) if _is("AcceleratedOptimizer", optimizer) else 1


def device_of(loader: DataLoader[Any]) -> torch.device | None:
    """To which a prepared loader moves its batches."""
    prepared: Any = loader
    return prepared.device if _is("DataLoaderShard", loader) else None


def whole_batches(sampler: Any) -> Any:
    """The batch sampler of which accelerate gives each process its share, or ``sampler`` itself."""
    return sampler.batch_sampler if _is("BatchSamplerShard", sampler) else sampler


def is_seedable(sampler: object) -> bool:
    """Whether it is the random sampler of accelerate's ``use_seedable_sampler``."""
    return _is("SeedableRandomSampler", sampler)


def _is(name: str, thing: object) -> bool:
    kinds = type(thing).__mro__  # not thing.__class__, of which accelerate's loaders tell something else
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == "accelerate" for kind in kinds)
