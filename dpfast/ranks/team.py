"""Ranks: the processes that train one model, and what they tell each other beside its sums."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpfast import errors
from dpfast.errors import ConfigError, DPFastError, PrivacyError
from dpfast.privacy import poisson_sample

if dist.is_available():
    # Default arguments of this module hold the default group that there is when it is imported. torch.optim may import
    # it later; gloo's threads outlive the group then, and one that lets go of a tensor while Python ends aborts the
    # process.
    import torch.distributed.nn.functional

T = TypeVar("T")

# Others may wait for hours while one works; when one dies its connections close, and torchrun ends all.
PATIENCE = timedelta(days=7)
COMPARED = 64  # examples by which ranks see that they have the same data set
_SPEAKS_FIRST = timedelta(seconds=5)  # for rank 0 to meet the error that another rank has met


class Ranks:
    """The processes of torch.distributed's default group, or this one alone.

    What is said here goes over a gloo group of its own, on the CPU: the ids of a sample and some bytes a step, whatever
    the size of the model. Every method but ``take``, ``tally`` and ``speaks`` is a collective: all ranks call it, in
    the same order.
    """

    def __init__(self, rank: int, size: int, control: Any = None) -> None:
        self.rank, self.size = rank, size
        # Held weakly: a trainer that lives until Python ends must not keep the group's threads until then.
        self._control_of = None if control is None else ref(control)
        self._rounds = 0
        # A store may outlive a group of processes (torchrun's does): no two groups count in one place.
        self._life = self.first(lambda: os.urandom(8).hex()) if size > 1 else ""

    @classmethod
    def current(cls) -> Self:
        """Those of the default group, if there is one; the same object for as long as that lives."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls.alone()
        world = dist.group.WORLD
        if world not in _KNOWN:
            control = dist.new_group(backend="gloo", timeout=PATIENCE)
            _KNOWN[world] = cls(dist.get_rank(), dist.get_world_size(), control)
        return cast(Self, _KNOWN[world])

    @classmethod
    def alone(cls) -> Self:
        """One process by itself, whether or not there are others."""
        return cls(0, 1)

    def _control(self) -> Any:
        """The group to speak over, as long as it lives."""
        control = None if self._control_of is None else self._control_of()
        if control is None:
            raise ConfigError(
                f"rank {self.rank} of {self.size}: the process group is gone (destroy_process_group). Expected it to"
                " last as long as training does; make trainer and optimizer again in a new one"
            )
        return control

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which keeps ledger and checkpoints and speaks to people."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on rank 0, which alone calls it; what it raises there is raised on every rank."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        raised: Exception | None = None
        if self.leads:
            try:
                said[0] = make()
            except Exception as error:
                raised, said[1] = error, (type(error).__name__, str(error))
        value = said[0]
        dist.broadcast_object_list(said, src=0, group=self._control())
        if raised is not None:
            raise raised
        if said[1] is not None:
            name, text = said[1]
            kind = getattr(errors, name, DPFastError)
            raise kind(f"rank 0: {text}" if kind is not DPFastError else f"rank 0 stopped with {name}: {text}")
        return cast(T, value if self.leads else said[0])

    def agree(self, error: DPFastError | None) -> None:
        """Raise on every rank what any of them has to refuse, so that none waits for one that has stopped."""
        if self.size > 1:
            refused = torch.tensor([error is not None], dtype=torch.int32)
            dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=self._control())
            if refused.item():
                said = self.tell(None if error is None else str(error))
                if error is None:
                    rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
                    raise PrivacyError(f"rank {rank} has refused this, and nothing was updated: {text}")
        if error is not None:
            raise error

    def alike(self, what: str, value: str, cure: str) -> None:
        """Raise ConfigError on every rank unless ``value`` is the same on all of them."""
        said = self.tell(value)
        differ = [rank for rank, other in enumerate(said) if other != said[0]]
        if differ:
            raise ConfigError(f"{what}: rank {differ[0]} has another than rank 0. {cure}")

    def tell(self, value: T) -> list[T]:
        """What each rank has to say, by rank."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value, group=self._control())
        return said

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=self._control())

    def take(self, count: int) -> Iterator[int]:
        """Numbers below ``count``, each for one rank: whoever is free takes the next.

        All ranks call it equally often. It is no collective: a rank may be through before another has begun.
        """
        taken = self.tally()

        def numbers() -> Iterator[int]:
            while (mine := taken(1) - 1) < count:
                yield mine

        return numbers()

    def tally(self) -> Callable[[int], int]:
        """``add(n)``, which gives the sum of what all ranks have added so far. All ranks make it equally often."""
        self._rounds += 1
        if self.size == 1:
            return _Sum().add
        self._control()
        place, store = f"dpfast/{self._life}/{self._rounds}", _store()
        return lambda n: store.add(place, n)

    def speaks(self) -> bool:
        """For a rank that ends with an error: whether it is the one to tell people. Of all that end, one is.

        Rank 0, if it meets an error within seconds: most are met by all, or reach the others as lost connections.
        """
        if self.size == 1:
            return True
        place, store = f"dpfast/{self._life}/ended", _store()
        try:
            if not self.leads:
                with suppress(dist.DistStoreError):
                    store.wait([place], _SPEAKS_FIRST)
            return store.add(place, 1) == 1
        except RuntimeError:  # it was on rank 0, which is gone
            return False

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Make them those of rank 0, in place."""
        if self.size == 1:
            return
        self._control()
        for t in tensors:
            whole = t.detach().contiguous()
            dist.broadcast(whole, src=0)
            t.detach().copy_(whole)


class _Sum:
    def __init__(self) -> None:
        self._total = 0

    def add(self, n: int) -> int:
        self._total += n
        return self._total


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001


_KNOWN: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


def share(dataset_size: int, sample_rate: float, ranks: Ranks | None = None) -> Tensor:
    """A rank's part of one Poisson sample (``poisson_sample``): ascending ids, int64, possibly none.

    Guarantee: rank 0 draws the sample, with its operating system's entropy, of the whole data set; each id is in the
    part of exactly one rank. Parts differ in length by one at most.
    """
    ranks = ranks or Ranks.current()
    return ranks.first(lambda: poisson_sample(dataset_size, sample_rate))[ranks.rank :: ranks.size]


def check_data(ranks: Ranks, count: int, read: Callable[[list[int]], Iterable[Any]]) -> None:
    """Raises ConfigError on every rank unless all have the same examples, as far as ``COMPARED`` of them tell.

    count: examples; read: what those of some numbers hold. What differs each time that it is read is not compared.
    """
    if ranks.size == 1:
        return
    few = np.linspace(0, count - 1, min(count, COMPARED)).astype(int).tolist()
    now = digest(read(few))
    said = f"{count} {now if now == digest(read(few)) else 'random'}"
    ranks.alike("data set", said, "Give every rank all of it: each sample is dealt out to them")


def digest(values: Iterable[Any]) -> str:
    """Of tensors, arrays, numbers and texts, to compare; of anything else only its type counts."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            total.update(f"{tuple(value.shape)} {value.dtype}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(value if isinstance(value, int | float | str | bytes) else type(value)).encode())
    return total.hexdigest()
