"""PrivateLoader: the user's data loader, with batches that are Poisson samples of operating-system entropy."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from dpfast.clipping.trees import leaves
from dpfast.engine.accelerated import device_of, is_seedable, whole_batches
from dpfast.engine.batches import emptied, mapped
from dpfast.engine.collation import Collate
from dpfast.engine.padding import Padded
from dpfast.engine.session import Draw, Session
from dpfast.errors import ConfigError, PrivacyError
from dpfast.privacy import poisson_sample
from dpfast.ranks import Ranks
from dpfast.ranks.team import check_data

_KEPT = (  # of the user's loader
    *("dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
    *("prefetch_factor", "persistent_workers"),
)


class PoissonBatches(Sampler[list[int]]):
    """``steps`` Poisson samples in each pass, each in ``parts`` physical batches, or in as many as it takes that they
    have at most ``largest`` examples.

    What is empty is given as the index 0, whose example is taken out again (``emptied``): it shows the shapes. Of
    several ranks each gives its part of every sample; all samples of a pass are then drawn at its beginning, since
    ranks read ahead of the batch that they train on by different numbers of physical batches.
    """

    def __init__(
        self, dataset_size: int, sample_rate: float, steps: int, *, parts: int = 1, largest: int | None = None
    ) -> None:
        self.dataset_size, self.sample_rate, self.steps = dataset_size, sample_rate, steps
        self.parts, self.largest = parts, largest
        self.ranks = Ranks.current()
        self.drawn: deque[Draw] = deque()  # what the last pass has given to the loader, in order

    def __len__(self) -> int:
        if self.largest is None:
            return self.steps * self.parts
        return math.ceil(self.steps * self.sample_rate * self.dataset_size / self.largest)

    def __iter__(self) -> Iterator[list[int]]:
        self.drawn = deque()
        return self._pass(self.drawn)

    def _pass(self, drawn: deque[Draw]) -> Iterator[list[int]]:
        for sample in self._samples():
            parts = self.parts if self.largest is None else max(1, math.ceil(len(sample) / self.largest))
            for i, part in enumerate(np.array_split(sample, parts)):
                drawn.append(Draw(len(part), first=i == 0, last=i == parts - 1))
                yield part.tolist() or [0]

    def _samples(self) -> Iterator[NDArray[np.int64]]:
        """Of this rank."""
        draw = (poisson_sample(self.dataset_size, self.sample_rate).numpy() for _ in range(self.steps))
        if self.ranks.size > 1:
            draw = (sample[self.ranks.rank :: self.ranks.size] for sample in self.ranks.first(lambda: list(draw)))
        return draw


class PrivateLoader(DataLoader[Any]):
    """The user's ``loader`` (data set, collate function, workers, pinned memory), with Poisson samples for batches.

    Each example is in each batch with probability ``1 / len(loader)``, whatever the others do: the batches' sizes vary,
    and may be 0 (tensors of 0 rows, which are a step of noise alone). They come from the operating system's entropy,
    which no generator and no seed reaches. Of several ranks each gives its part of every sample. largest: examples in
    a physical batch (``BatchMemoryManager``).

    Where the session has several batches to a step (accumulated gradients), that many of the user's make one sample:
    each example is in it with probability ``session.batches / len(loader)``, and in one of its batches.
    """

    samples: PoissonBatches

    def __init__(self, loader: DataLoader[Any], session: Session, *, largest: int | None = None) -> None:
        if not isinstance(loader, PrivateLoader):
            _check(loader)
            items, ranks = loader.dataset, Ranks.current()
            check_data(ranks, len(items), lambda few: (leaf for i in few for leaf in leaves(items[i])))  # type: ignore[arg-type]
        steps, parts = steps_of(loader, session.batches), session.batches
        size = len(loader.dataset)  # type: ignore[arg-type]
        self.samples = PoissonBatches(size, 1 / steps, steps, parts=parts, largest=largest)
        given = {name: getattr(loader, name) for name in _KEPT}
        if not isinstance(loader.collate_fn, Collate):
            given["collate_fn"] = Collate(loader.collate_fn, session.clipper.augmult)
        super().__init__(batch_sampler=self.samples, **given)
        self.session = session
        self.device: torch.device | None = loader.device if isinstance(loader, PrivateLoader) else device_of(loader)

    @property
    def sample_rate(self) -> float:
        """With which an example is in a batch."""
        return self.samples.sample_rate

    def _placed(self, batch: Any) -> Any:
        """On the device."""
        if self.device is None:
            return batch
        return mapped(batch, lambda t: t.to(self.device, non_blocking=self.pin_memory))

    def in_parts(self, largest: int) -> Self:
        """The same loader, whose samples come in physical batches of at most ``largest`` examples."""
        return type(self)(self, self.session, largest=largest)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        return self._deal(batches, self.samples)

    def _deal(self, batches: Iterator[Any], sampler: PoissonBatches) -> Iterator[Any]:
        drawn, session = sampler.drawn, self.session
        for batch in batches:
            draw = drawn.popleft()
            if draw.first and session.is_spent():
                return
            padded = batch if isinstance(batch, Padded) else Padded(batch)
            if not draw.examples:
                padded = Padded(emptied(batch, session.clipper.augmult))
            del batch
            padded = Padded(self._placed(padded.batch), *padded[1:3], self._placed(padded.other))
            session.deal(draw, padded)
            given = padded.batch
            del padded
            yield given
            del given
            session.take_back()


def steps_of(loader: DataLoader[Any], batches: int) -> int:
    """Updates in one pass, where ``batches`` of the user's make one."""
    return loader.samples.steps if isinstance(loader, PrivateLoader) else math.ceil(len(loader) / batches)


def _check(loader: DataLoader[Any]) -> None:
    """Raises ConfigError for a loader of which no Poisson samples can be drawn."""
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            "data_loader: an IterableDataset cannot be sampled from (each example is to be in each batch by chance, and"
            " the accounting needs their number): give a data set with __len__ and __getitem__"
        )
    if loader.batch_sampler is None:
        raise ConfigError("data_loader: expected batches, got batch_size=None: give the DataLoader a batch_size")
    batches = whole_batches(loader.batch_sampler)
    sampler = getattr(batches, "sampler", loader.sampler)  # the latter is another in accelerate's
    usual = type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler) or is_seedable(sampler)
    if type(batches) is not BatchSampler or not usual:
        raise ConfigError(
            f"data_loader: its {type(batches).__name__} of a {type(sampler).__name__} would be"
            " replaced by Poisson samples of the whole data set. For some of it, give the DataLoader a"
            " torch.utils.data.Subset; otherwise leave sampler and batch_sampler out"
        )
    if not getattr(loader, "in_order", True):
        raise ConfigError("data_loader: in_order=False would mix up batches: leave it at its default")
    if not len(loader.dataset):
        raise PrivacyError("data_loader: the data set is empty")
