"""Row ownership is shown, not assumed.

Clipping per example bounds what one record can do only if the rows of different examples never meet. Two probes show
it:

- backward, for every pair of examples: groups of examples are back-propagated alone, and at every use the gradient
  must be zero outside the rows of the group, and inside what it was when all were back-propagated (a hook that scales
  by a norm of the batch's gradient changes it). The groups are the bits of the examples' numbers and their complements,
  so ``2 log2(B)`` backward passes part every example from every other. This also finds the dimension of the rows.
- forward, on synthetic input: changing the rows of some examples must not change the output of the others (what a
  gradient cannot show: statistics over the batch behind a ``detach``).

Weights that are (nearly) zero, as zero-initialised gates and last layers are, hide what lies behind them: the forward
probe runs a second time with random numbers in their place, and larger ones of both signs as input. Both probes are
done when a step takes a path that was not shown. They are repeated, with two halves of the examples and the weights as
they are, after 1, 2, 4, 8, ... updates of the parameters, as far as that takes little of the time (``dpfast.pace``).
What depends on the values of the data (rows that meet only for certain images) no probe can exclude.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpfast.clipping.tape import Receive, Site, TapedUse

Signature = int  # the hash of a step's uses with their shapes, what it called, and the modes of the layers
ENOUGH_STEPS = 8  # probed, when there are never gradients of half of the examples: a choice, not a measurement
MANY_PATHS = 32  # of one model: then probes are a cost to speak of
MOST_PATHS = 1024  # remembered: some 20 kB each
SAME_IN_LOW_PRECISION = 0.05  # how far a gradient may be from itself, relatively
SUMS = 64  # of a sketch: they tell the size of a difference to within 20%


@dataclass(frozen=True)
class Evidence:
    """What probes have said of one use.

    dims: the dimensions that may still hold the rows. informative: the examples of which, in this step, a gradient
    that is not zero was seen. steps: how many steps saw two or more.
    """

    dims: tuple[int, ...]
    informative: frozenset[int] = frozenset()
    steps: int = 0

    def settled(self, examples: int) -> bool:
        """One dimension is left, and enough examples took part to believe that the others would agree."""
        enough = len(self.informative) >= max(2, examples / 2) or self.steps >= ENOUGH_STEPS
        return len(self.dims) == 1 and enough


@dataclass
class Ownership:
    """The row dimension of every use, by the signature of the step; outlives steps, holds no tensors."""

    evidence: dict[tuple[Signature, Site], Evidence] = field(default_factory=dict)
    dims: dict[Signature, dict[Site, int]] = field(default_factory=dict)
    shown: set[Signature] = field(default_factory=set)  # in full, with earlier weights
    times: int = 0  # that everything was forgotten

    def known(self, signature: Signature) -> dict[Site, int]:
        """Row dimensions of the uses that are settled. The oldest signatures are forgotten, and shown anew."""
        while len(self.dims) > MOST_PATHS:
            del self.dims[next(iter(self.dims))]
        return self.dims.setdefault(signature, {})

    def forget(self, *, wholly: bool = False) -> None:
        """Show every use anew; what was shown in full, in part: other weights can only bring out what these hid."""
        self.shown.update(signature for signature, dims in self.dims.items() if dims)
        if len(self.shown) > MOST_PATHS or wholly:
            self.shown.clear()
        self.dims.clear()
        self.times += 1

    def repeats(self, signature: Signature) -> bool:
        """Whether what it shows next was shown with earlier weights, and not since."""
        return signature in self.shown and not self.dims.get(signature)

    def groups(self, signature: Signature, examples: int) -> list[list[int]]:
        """Of examples to back-propagate: all of ``groups``, or a random half and the other half."""
        if signature not in self.shown:
            return groups(examples)
        half = random.Random(self.times).sample(range(examples), examples // 2)
        return [sorted(half), sorted(set(range(examples)) - set(half))]

    def recall(self, signature: Signature, site: Site, dims: tuple[int, ...]) -> Evidence:
        """What earlier steps left of ``dims``."""
        before = self.evidence.get((signature, site))
        if before is None:
            return Evidence(dims)
        return Evidence(tuple(d for d in dims if d in before.dims), steps=before.steps)

    def settle(
        self, signature: Signature, evidence: Mapping[Site, Evidence], examples: int, fleeting: Collection[Site]
    ) -> list[Site]:
        """Remember what a step has shown, but for ``fleeting`` uses, whose rows may have other owners in the next step.

        Gives the uses that are left without a dimension that may hold the rows.
        """
        for site, found in evidence.items():
            found = replace(found, steps=found.steps + (len(found.informative) >= 2))
            if site in fleeting:
                continue
            if found.settled(examples):
                self.known(signature)[site] = found.dims[0]
                self.evidence.pop((signature, site), None)
            elif found.dims and len(self.evidence) < MOST_PATHS:
                self.evidence[signature, site] = found
        return [site for site, found in evidence.items() if not found.dims]


def groups(examples: int) -> list[list[int]]:
    """Groups of examples such that for every two, some group holds the first and not the second."""
    bits = [[i for i in range(examples) if i >> bit & 1] for bit in range((examples - 1).bit_length())]
    return [group for ones in bits for group in (ones, sorted(set(range(examples)) - set(ones)))]


def possible_dims(use: TapedUse, g: Tensor, examples: int) -> tuple[int, ...]:
    """Dimensions of the output that can be cut into one block per example."""
    dims = use.row_dims if use.row_dims is not None else tuple(range(g.ndim))
    return tuple(d for d in dims if d < g.ndim and g.shape[d] and g.shape[d] % examples == 0)


def is_fleeting(use: TapedUse, g: Tensor, dims: Sequence[int], examples: int, rows: int) -> bool:
    """Whether a use has rows that were selected, or neither a place for each row nor one for each example: in another
    step they may have other owners.
    """
    return use.selected or any(g.shape[d] % rows and g.shape[d] != examples for d in dims)


@dataclass(frozen=True)
class Sketch:
    """A summary of a gradient, by which two gradients can be compared.

    By dimension that may hold the rows, of the block of each example:
    sums ``[B, SUMS]``: its finite numbers with random signs, each added to one of the sums, so that the squared length
        of a difference is in expectation that of the gradients' difference (Charikar et al. 2002, CountSketch), but for
        a factor;
    finite ``[B, SUMS]``: the same of ones where numbers are finite, and zeros;
    touched ``[B]``: whether there is a finite number that is not 0.
    eps: of the gradient's dtype.
    """

    sums: dict[int, Tensor]
    finite: dict[int, Tensor]
    touched: dict[int, Tensor]
    eps: float

    def owners(self, dim: int) -> frozenset[int]:
        """Examples that have touched blocks."""
        return frozenset(self.touched[dim].nonzero().flatten().tolist())

    def agrees(self, other: "Sketch", dim: int, examples: Sequence[int]) -> bool:
        """Whether the blocks of ``examples`` hold the same but for a few hundred roundings, where they are finite.

        Blocks that are finite in different places say nothing: 0 * inf of another example's activation is NaN without
        any mixing.
        """
        comparable = (self.finite[dim] == other.finite[dim]).all(1)[list(examples)]
        mine, others = (sketch.sums[dim][list(examples)][comparable] for sketch in (self, other))
        tolerance = min(SAME_IN_LOW_PRECISION, 1e3 * self.eps)
        return bool((mine - others).norm() <= tolerance * mine.norm())


class Sketches:
    """Makes sketches that can be compared with each other. planned: of tensors that hold no numbers."""

    def __init__(self, examples: int, *, planned: bool = False) -> None:
        self.examples, self.planned = examples, planned
        self._signs = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def of(self, g: Tensor, dims: Sequence[int]) -> Sketch:
        """Of a gradient whose rows lie along one of ``dims``."""
        if self.planned or bool(g.sum().isfinite()):  # then each number is; a sum that overflows is no harm
            blocks = {d: _blocks(g, d, self.examples) for d in dims}
            finite = {d: self._sums(torch.ones_like(of[:1])).expand(len(of), -1) for d, of in blocks.items()}
        else:
            places = g.isfinite()
            blocks = {d: _blocks(torch.where(places, g, 0), d, self.examples) for d in dims}
            finite = {d: self._sums(_blocks(places, d, self.examples)) for d in dims}
        return Sketch(
            {d: self._sums(of) for d, of in blocks.items()},
            finite,
            {d: of.abs().amax(1) > 0 if of.shape[1] else of.any(1) for d, of in blocks.items()},
            torch.finfo(g.dtype).eps,
        )

    def _sums(self, blocks: Tensor) -> Tensor:
        missing = blocks.shape[1] - len(self._signs)
        if missing > 0:
            more = torch.randint(2, (missing,), generator=self._generator).to(blocks.device, torch.float32)
            self._signs = torch.cat([self._signs.to(more), 2 * more - 1])
        scale = 0.5 ** (blocks.shape[1] // SUMS).bit_length()  # as many huge numbers do not add up to infinity
        signed = blocks * (scale * self._signs[: blocks.shape[1]])
        return pad(signed, (0, -blocks.shape[1] % SUMS)).unflatten(1, (-1, SUMS)).sum(1).double()


class Showing:
    """One step's evidence for the uses whose rows it has to show."""

    def __init__(self, ownership: Ownership, signature: Signature, examples: int) -> None:
        self.ownership, self.signature, self.examples = ownership, signature, examples
        self.evidence: dict[Site, Evidence] = {}
        self._whole: dict[Site, Sketch] = {}
        self._sketches = Sketches(examples)

    def begin(self, use: TapedUse, g: Tensor) -> None:
        """The losses of all examples gave ``g`` at this use."""
        dims = possible_dims(use, g, self.examples)
        self.evidence[use.site] = self.ownership.recall(self.signature, use.site, dims)
        self._whole[use.site] = self._sketches.of(g, dims)

    def weigh(self, use: TapedUse, g: Tensor, group: Sequence[int]) -> None:
        """The losses of ``group`` alone gave ``g``."""
        if use.site in self.evidence:
            before = self.evidence[use.site]
            self.evidence[use.site] = weigh(before, self._sketches.of(g, before.dims), self._whole[use.site], group)

    def weighing(self, group: Sequence[int]) -> Receive:
        """For a backward pass of ``group``."""
        return lambda use, _saved, g: self.weigh(use, g, group)


def weigh(evidence: Evidence, alone: Sketch, whole: Sketch, group: Sequence[int]) -> Evidence:
    """Evidence after the losses of ``group`` alone gave the gradient ``alone`` at a use, and those of all ``whole``."""
    owners = {d: alone.owners(d) for d in evidence.dims}
    dims = tuple(d for d in evidence.dims if owners[d].issubset(group) and whole.agrees(alone, d, group))
    seen = evidence.informative | owners[dims[0]] if dims else frozenset()
    return replace(evidence, dims=dims, informative=seen)


def likely_dim(evidence: Evidence, g: Tensor, examples: int) -> int:
    """Of those that may still hold the rows, the one by which the fewest examples are not finite."""
    if len(evidence.dims) == 1 or bool(g.isfinite().all()):
        return evidence.dims[0]
    return min(evidence.dims, key=lambda d: int(_blocks(~g.isfinite(), d, examples).any(1).sum()))


def _blocks(t: Tensor, dim: int, examples: int) -> Tensor:
    """``[B, entries]``: of the rows of each example along ``dim``."""
    return t.movedim(dim, 0).reshape(examples, -1)
