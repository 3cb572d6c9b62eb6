"""Examples by number, whatever holds them, as batches of tensors."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dpfast.data.images import ImageSet
from dpfast.errors import ConfigError, DataError


class Dataset(Protocol):
    """Numbered examples: an ``ImageSet``, or anything whose items are tensors, numbers or tuples of them."""

    def __len__(self) -> int: ...


class Examples:
    """A data set read by numbers.

    Raises ConfigError for a data loader (it decides by itself which examples form a batch) and a tuple, DataError for
    items that are no tensors or of different shapes.
    """

    def __init__(self, dataset: Dataset) -> None:
        if isinstance(dataset, DataLoader) or not (isinstance(dataset, ImageSet) or hasattr(dataset, "__getitem__")):
            raise ConfigError(
                f"dataset is a {type(dataset).__name__}: expected the numbered examples themselves (dataset[i]), from"
                " which each step draws its own Poisson sample"
            )
        if isinstance(dataset, tuple):
            raise ConfigError(
                f"dataset is a tuple of {len(dataset)}: expected numbered examples (dataset[i]);"
                " torch.utils.data.TensorDataset(*tensors) makes them of tensors"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, ids: Tensor, size: int) -> tuple[Tensor, ...]:
        """The tensors of examples ``ids``, each padded with zeros to ``[size, ...]``."""
        kept = [x[: len(ids)] for x in self._read(ids)]
        return tuple(torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in kept)

    def unlike(self, count: int) -> Tensor:
        """Numbers of a few examples, as far as possible with different labels (the whole numbers of an example)."""
        if isinstance(self.dataset, ImageSet):
            candidates, labels = torch.arange(len(self)), self.dataset.labels.view(-1, 1)
        else:
            candidates = torch.linspace(0, len(self) - 1, min(len(self), 16 * count)).long().unique()
            batch = self.batch(candidates, len(candidates))
            wholes = [x.reshape(len(x), -1).long() for x in batch if not x.is_floating_point() and x.ndim < 3]
            labels = torch.cat(wholes, 1) if wholes else torch.zeros(len(candidates), 1)
        _, kinds = labels.unique(dim=0, return_inverse=True)
        firsts = [int((kinds == kind).nonzero()[0]) for kind in kinds.unique()]
        rest = sorted(set(range(len(candidates))) - set(firsts))
        return candidates[torch.tensor([*firsts, *rest][:count])]

    def _read(self, ids: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.dataset, ImageSet):
            return self.dataset.images[ids], self.dataset.labels[ids]
        template = ids.tolist() or [0]  # an empty batch still has shapes and dtypes
        items = [self.dataset[i] for i in template]
        try:
            batch: Any = default_collate(items)
        except (TypeError, RuntimeError) as error:
            raise DataError(f"the examples of the data set cannot be batched: {error}") from error
        parts = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(parts, tuple | list) or not all(isinstance(part, Tensor) for part in parts):
            raise DataError(
                f"an example is a {type(items[0]).__name__}: expected a tensor, or a tuple of tensors and numbers;"
                " wrap the data set and pick what the objective needs"
            )
        return tuple(parts)
