"""The command line as one of several processes that torchrun has started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dpfast.errors import ConfigError
from dpfast.ranks import Ranks
from dpfast.ranks.team import PATIENCE

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def together() -> Iterator[Ranks]:
    """The ranks that torchrun has started, in a process group that lasts as long as this; those of one that is there.

    Of an error that several ranks meet one of them tells, rank 0 if it is among them; the others end without a word.
    Warnings are shown by rank 0 alone.

    Raises ConfigError where the environment names other processes, and not how to reach them.
    """
    if dist.is_initialized():
        yield Ranks.current()
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} in the environment, without {', '.join(missing)}: expected all"
            " that torchrun sets; start it by torchrun, or unset WORLD_SIZE to work alone"
        )
    _make_group()
    ranks = Ranks.current()
    with warnings.catch_warnings():
        if not ranks.leads:
            warnings.showwarning = _unseen
        try:
            yield ranks
            ranks.wait()
        except BaseException as error:  # the group stays: the end of NCCL's may wait for ranks that are stuck
            if ranks.speaks():
                raise
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
    dist.destroy_process_group()


def use_own_gpu(device: str, ranks: Ranks) -> None:
    """Make "cuda" mean this rank's GPU, that of its number on this machine.

    Raises ConfigError for a GPU by number, which all ranks would share, and where there are too few.
    """
    if torch.device(device).type != "cuda" or ranks.size == 1:
        return
    if ":" in device:
        raise ConfigError(
            f"recipe key performance.device = {device!r}: expected a GPU for each of {ranks.size} processes:"
            " --set performance.device=cuda"
        )
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= there:
        raise ConfigError(
            f"rank {ranks.rank} is process {own} of its machine, which has {there} GPUs: expected one for each process;"
            f" start fewer (--nproc-per-node {there})"
        )
    torch.cuda.set_device(own)


def _make_group() -> None:
    """With a backend for each device, whatever the recipe will name: NCCL connects when it is first used."""
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps one store over restarts, and gloo would read there where the processes before it listened.
    store = PrefixStore(f"dpfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _unseen(*_: object, **__: object) -> None:
    pass
