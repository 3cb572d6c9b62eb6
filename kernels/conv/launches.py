"""How the kernels of ``conv.triton`` are launched: tiles of weight gradients, and how long a GPU takes over them.

No Triton is needed to know: ``dpfast.kernels.cost`` predicts by it for GPUs that are not here.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Launch:
    """Blocks of ``p`` rows and ``c`` columns, so many of them in a program, and at most ``k`` positions at a time."""

    p: int
    c: int
    rows: int = 1
    columns: int = 1
    k: int = 64
    warps: int = 8
    stages: int = 3

    def tiles(self, sizes: tuple[int, ...], taps: int) -> int:
        """Programs that cover the gradient of one example. sizes: as of a ``Problem``."""
        _, _, groups, c, p = sizes
        return groups * math.ceil(p / (self.p * self.rows)) * math.ceil(taps * math.ceil(c / self.c) / self.columns)

    def at_a_time(self, positions: int) -> int:
        """Positions, where an example has so many: what a matrix unit takes at least."""
        return min(self.k, max(LEAST, 1 << (positions - 1).bit_length()))

    def steps(self, positions: int) -> int:
        """Of an example."""
        return math.ceil(positions / self.at_a_time(positions))


LEAST = 16
# Of sums over examples, whose tiles take twice the registers, and of each example; for float32 and for less.
_DESCRIBED = {
    (False, True): (
        *(Launch(64, 64, 3, columns) for columns in (3, 2)),
        *(Launch(128, 64, 1, columns) for columns in (3, 2)),
        Launch(64, 64, warps=4),
    ),
    (True, True): (
        *(Launch(128, 64, 1, columns) for columns in (3, 2)),
        *(Launch(64, 64, 1, columns, warps=4) for columns in (2, 1)),
    ),
    (False, False): (Launch(64, 64, 1, 2, k=32), Launch(64, 64, k=32, warps=4)),
    (True, False): (Launch(64, 64, k=32), Launch(64, 64, k=32, warps=4)),
}
# Larger tiles take fewer positions at a time: what is calculated for each of their places takes registers, too.
_POINTED = {
    True: tuple(
        Launch(p, c, k=16 if p * c > 8192 else 64, warps=8 if p * c > 2048 else 4)
        for p in (128, 64, 32, 16)
        for c in (128, 64, 32, 16)
    ),
    False: tuple(
        Launch(p, c, k=16 if p * c > 2048 else 32, warps=8 if p * c > 1024 else 4)
        for p in (64, 32, 16)
        for c in (64, 32, 16)
    ),
}
# Multiply-adds of a processor while a number comes from the L2 cache, at 5.7 TB/s: in half precision at 540 TFLOP/s, or
# of float32 at 90.
LOADS = {True: 95, False: 32}


class Chosen(NamedTuple):
    """each: examples that a program takes, one after the other. time: multiply-adds of a processor meanwhile."""

    launch: Launch
    tiles: int
    each: int
    time: int


def launches(*, described: bool, total: bool, half: bool) -> tuple[Launch, ...]:
    """All that a problem may be launched with."""
    return _DESCRIBED[total, half] if described else _POINTED[half]


MOST_PARTS = 24  # of a sum over examples, each stored once: where its tiles are too few for the processors


@functools.lru_cache(maxsize=4096)
def chosen(
    sizes: tuple[int, ...], positions: int, taps: int, processors: int, *, described: bool, total: bool, half: bool
) -> Chosen:
    """The launch with the least predicted time: multiplications or loads, of whole waves of programs.

    sizes: as of a ``Problem``; positions: over which a gradient is summed up, those of all rows of an example.
    """
    every = launches(described=described, total=total, half=half)
    return min(
        (_timed(launch, sizes, positions, taps, processors, total=total, half=half) for launch in every),
        key=lambda of: of.time,
    )


@functools.lru_cache(maxsize=4096)
def measuring(
    sizes: tuple[int, ...], positions: int, taps: int, processors: int, *, described: bool, half: bool
) -> Chosen:
    """Of norms of gradients that are added up later, not stored: products are added up in the very order of the sum.

    Where gradients cancel, another order is another gradient. Tiles that descriptors fetch are multiplied alike by all
    launches (64 rows at least, so many positions at a time); else it is the launch of the sum.
    """
    if described:
        return chosen(sizes, positions, taps, processors, described=True, total=False, half=half)
    launch = chosen(sizes, positions, taps, processors, described=False, total=True, half=half).launch
    return _timed(launch, sizes, positions, taps, processors, total=False, half=half)


def of_tile(p: int, c: int, half: bool) -> int:
    """Multiply-adds in the time that a tile takes for each position: those that it needs, or while it is loaded."""
    return max(p * c, LOADS[half] * (p + c))


def _timed(
    launch: Launch, sizes: tuple[int, ...], positions: int, taps: int, processors: int, *, total: bool, half: bool
) -> Chosen:
    examples, tiles = max(1, sizes[0]), max(1, launch.tiles(sizes, taps))
    p, c = launch.p * launch.rows, launch.c * launch.columns

    def rounds(each: int) -> int:
        return each * math.ceil(math.ceil(examples / each) * tiles / processors)

    parts = range(1, min(examples, MOST_PARTS) + 1)
    each = min((math.ceil(examples / count) for count in parts), key=rounds) if total else 1
    of_step = launch.at_a_time(positions) * of_tile(p, c, half)
    return Chosen(launch, tiles, each, rounds(each) * launch.steps(positions) * of_step)


NUMBER = {True: 2.0, False: 0.34}  # likewise of every processor, while memory takes or gives a number of four bytes


@functools.lru_cache(maxsize=4096)
def shares(
    sizes: tuple[int, ...], positions: int, taps: int, processors: int, *, most: int, described: bool, half: bool
) -> tuple[int, float]:
    """Into how many an example's positions are cut, each for a program of its own, where there are few examples; and
    multiply-adds of a processor that gradients then take. Shares are stored, and added up: two more passes.

    most: what their number has to divide.
    """
    examples, _, _, c, p = sizes
    numbers = examples * sizes[2] * p * c * taps

    def time(count: int) -> float:
        cut = (examples * count, *sizes[1:])
        found = chosen(cut, positions // count, taps, processors, described=described, total=False, half=half)
        through_memory = (2 * count + 1) * numbers * NUMBER[half] if count > 1 else 0
        return found.time + through_memory

    return min(((count, time(count)) for count in (1, 2, 4, 8) if most % count == 0), key=lambda share: share[1])
