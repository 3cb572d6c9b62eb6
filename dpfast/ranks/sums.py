"""One reduction a step: the ranks' sums are added up, noised where they come together, and handed back.

A bucket of sums is reduced and scattered: each rank holds the totals of its own part of the numbers. It turns those
into noised means, which replicas gather; shards keep them. Sent for each parameter, whatever K and the number of
physical batches: what one all-reduce sends (replicas), or half of it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpfast.ranks.shards import as_shard, is_shard, shard_of
from dpfast.ranks.team import Ranks

BUCKET = 1 << 23  # numbers (32 MB of float32): while one is noised, the next is on its way

Noise = Callable[[Tensor], Tensor]  # a total to its noised mean


@torch.no_grad()
def add_up(parameters: Mapping[str, nn.Parameter], noise: Noise, ranks: Ranks) -> None:
    """Turn each rank's own sum in ``p.grad`` (None: 0) into ``noise(total)``.

    parameters: whole ones, alike on all ranks, in the same order. Of one that was gathered from shards (``gathered``)
    the noised mean goes to the gradient of the shard, and its own is None.
    noise: called on each rank for its own part of the numbers.
    """
    if ranks.size == 1:
        for p in parameters.values():
            mean = noise(torch.zeros_like(p) if p.grad is None else p.grad)
            shard = shard_of(p)
            p.grad = None
            shard.grad = as_shard(mean.view(-1), shard) if is_shard(shard) else mean
        return
    begun: deque[tuple[_Bucket, Any]] = deque()
    sent: list[tuple[_Bucket, Any]] = []
    for bucket in _buckets(list(parameters.values()), ranks.size):
        begun.append((bucket, bucket.reduce()))
        if len(begun) > 1:
            sent.append(_noise_first(begun, noise))
    while begun:
        sent.append(_noise_first(begun, noise))
    for bucket, work in sent:
        if work is not None:
            work.wait()
        bucket.hand_out()


def _either(name: str, before: str) -> Any:
    """A function of torch.distributed by its name since torch 2.13, or before; None where torch was built without."""
    return getattr(dist, name, None) or getattr(dist, before, None)


_reduce_scatter = _either("reduce_scatter_single", before="reduce_scatter_tensor")
_all_gather = _either("all_gather_single", before="all_gather_into_tensor")


def _noise_first(begun: "deque[tuple[_Bucket, Any]]", noise: Noise) -> "tuple[_Bucket, Any]":
    bucket, work = begun.popleft()
    work.wait()
    return bucket, bucket.gather(noise(bucket.own))


@dataclass
class _Bucket:
    """Sums side by side, ``numbers [R, n]``: row r is rank r's to noise. ``own [n]`` are the totals of this rank's."""

    parameters: Sequence[nn.Parameter]
    numbers: Tensor
    own: Tensor

    def reduce(self) -> Any:
        return _reduce_scatter(self.own, self.numbers.view(-1), async_op=True)

    def gather(self, means: Tensor) -> Any:
        raise NotImplementedError

    def hand_out(self) -> None:
        raise NotImplementedError


class _Replicated(_Bucket):
    """The numbers of all parameters one after another; what is left of the last row is 0."""

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], ranks: int) -> "_Replicated":
        total = sum(p.numel() for p in parameters)
        row = -(-total // ranks)
        flat = parameters[0].new_zeros(ranks * row)
        for p, part in _parts(flat, parameters):
            if p.grad is not None:
                part.copy_(p.grad)
            p.grad = None
        return cls(parameters, flat.view(ranks, row), flat.new_empty(row))

    def gather(self, means: Tensor) -> Any:
        return _all_gather(self.numbers.view(-1), means, async_op=True)

    def hand_out(self) -> None:
        for p, part in _parts(self.numbers.view(-1), self.parameters):
            p.grad = part


class _Sharded(_Bucket):
    """Row r holds the r-th shard of each parameter: ``ceil(d / R)`` of its d rows, or what is left of them, then 0."""

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], ranks: int) -> "_Sharded":
        numbers = torch.cat([_rows(p, ranks) for p in parameters], 1)
        for p in parameters:
            p.grad = None
        return cls(parameters, numbers, numbers.new_empty(numbers.shape[1]))

    def gather(self, means: Tensor) -> Any:
        self.own = means

    def hand_out(self) -> None:
        ranks, at = len(self.numbers), 0
        for p in self.parameters:
            shard = shard_of(p)
            shard.grad = as_shard(self.own[at:], shard)
            at += _columns(p, ranks)


def _rows(p: nn.Parameter, ranks: int) -> Tensor:
    """The sum of a parameter, ``[R, n]``: a row for each rank."""
    total = torch.zeros_like(p) if p.grad is None else p.grad
    missing = -len(p) % ranks
    if missing:
        total = torch.cat([total, total.new_zeros(missing, *p.shape[1:])])
    return total.reshape(ranks, -1)


def _columns(p: nn.Parameter, ranks: int) -> int:
    return -(-p.shape[0] // ranks) * p[0].numel() if p.numel() else 0


def _parts(flat: Tensor, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    at = 0
    for p in parameters:
        yield p, flat[at : at + p.numel()].view(p.shape)
        at += p.numel()


def _buckets(parameters: Sequence[nn.Parameter], ranks: int) -> Iterator[_Bucket]:
    """In order, each of one kind, dtype and device."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((is_shard(shard_of(p)), p.dtype, p.device), []).append(p)
    for (sharded, _, _), alike in kinds.items():
        kind = _Sharded if sharded else _Replicated
        bucket: list[nn.Parameter] = []
        for p in alike:
            bucket.append(p)
            if sum(q.numel() for q in bucket) >= BUCKET:
                yield kind.of(bucket, ranks)
                bucket = []
        if bucket:
            yield kind.of(bucket, ranks)
