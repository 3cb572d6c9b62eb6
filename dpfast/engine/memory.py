"""BatchMemoryManager: samples in physical batches that fit into memory."""

from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from dpfast.engine.loader import PrivateLoader
from dpfast.engine.optimizer import PrivateOptimizer
from dpfast.errors import ConfigError


class BatchMemoryManager:
    """Gives samples in parts that fit into memory.

    For example::

        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:
            for images, labels in parts: ...

    Each Poisson sample comes in physical batches of at most so many examples. The training loop stays as it is: for all
    but the last of a sample ``optimizer.step()`` keeps the sum and updates nothing, ``optimizer.zero_grad()`` keeps it,
    too. A mean loss is one over the physical batch.
    """

    def __init__(
        self, *, data_loader: DataLoader[Any], max_physical_batch_size: int, optimizer: PrivateOptimizer
    ) -> None:
        if not isinstance(data_loader, PrivateLoader) or not isinstance(optimizer, PrivateOptimizer):
            raise ConfigError(
                "BatchMemoryManager: expected the data loader and the optimizer that make_private returned, got a"
                f" {type(data_loader).__name__} and a {type(optimizer).__name__}"
            )
        if data_loader.session is not optimizer.session:
            raise ConfigError(
                "BatchMemoryManager: the data loader and the optimizer come from two calls of make_private; give it"
                " those of one"
            )
        if not isinstance(max_physical_batch_size, int) or max_physical_batch_size < 1:
            raise ConfigError(
                f"max_physical_batch_size={max_physical_batch_size!r}: expected a whole number of examples, 1 or more"
            )
        if data_loader.session.batches > 1:
            raise ConfigError(
                "BatchMemoryManager: the Accelerator has gradient_accumulation_steps, which divides samples into"
                " batches by itself; use one of the two"
            )
        self._loader = data_loader.in_parts(max_physical_batch_size)

    def __enter__(self) -> PrivateLoader:
        return self._loader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left behind."""
