"""Some examples at a time, so that what a kernel keeps meanwhile stays small."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BYTES = 1 << 26  # of Grams and patches alive at a time, if those of one example are fewer


def at_a_time(each: int, examples: int) -> int:
    """Examples in a chunk when each keeps so many bytes."""
    return max(1, min(examples, BYTES // max(1, each)))


def bytes_alive(each: int, examples: int) -> int:
    """Of a chunk."""
    return each * at_a_time(each, examples)


def chunks(each: int, examples: int) -> Iterator[slice]:
    """At least one, which is empty where there are no examples."""
    step = at_a_time(each, examples)
    for start in range(0, max(1, examples), step):
        yield slice(start, min(start + step, examples))


def in_chunks(each: int, examples: int, compute: Callable[[slice], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Two results ``[B]`` each, computed for some examples after the others."""
    firsts, seconds = zip(*map(compute, chunks(each, examples)), strict=True)
    return torch.cat(firsts), torch.cat(seconds)
