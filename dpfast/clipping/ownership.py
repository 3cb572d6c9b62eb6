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
done when a step takes a path that was not shown, and again, with two halves of the examples, after 1, 2, 4, 8, ...
updates of the parameters. What depends on the values of the data (rows that meet only for certain images) no probe can
exclude.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem
from dpfast.clipping.tape import Site, TapedUse
from dpfast.clipping.trees import replace_tensors, tensors_in

Signature = int  # the hash of a step's uses with their shapes, what it called, and the modes of the layers
ENOUGH_STEPS = 8  # probed, when there are never gradients of half of the examples: a choice, not a measurement
MANY_PATHS = 32  # of one model: then probes are a cost to speak of
MOST_PATHS = 1024  # remembered: some 20 kB each
SAME_IN_LOW_PRECISION = 0.05  # how far a gradient may be from itself, relatively


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
    ) -> list[Problem]:
        """Remember what a step has shown, but for ``fleeting`` uses, whose rows may have other owners in the next step.

        A use left without a possible row dimension is a problem.
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
        return [
            Problem(
                site.names,
                f"{site.function}: the gradient of one example's loss reaches rows of other examples (or the result"
                " has no dimension that holds the rows)",
                "keep examples apart along one dimension, the rows of each next to each other (the parts of an example"
                " as [B, parts, ...], flattened inside the model): no statistics, attention or means over the batch;"
                " call the model once, on all rows; register constant tensors as buffers",
            )
            for site, found in evidence.items()
            if not found.dims
        ]


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


def weigh(evidence: Evidence, g: Tensor, whole: Tensor, group: Sequence[int], examples: int) -> Evidence:
    """Evidence after the losses of ``group`` alone gave the gradient ``g`` at a use, and those of all gave ``whole``.

    Entries that are not finite say nothing: 0 * inf of another example's activation is NaN without any mixing.
    """
    finite = g.isfinite() & whole.isfinite()
    touched, expected = finite & (g != 0), torch.where(finite, whole, 0)
    error = torch.where(finite, g - whole, 0)
    owners = {}
    for d in evidence.dims:
        blocks = _blocks(touched, d, examples).any(1)
        owners[d] = frozenset(blocks.nonzero().flatten().tolist())
    dims = tuple(
        d
        for d in evidence.dims
        if owners[d].issubset(group)
        and _is_small(_blocks(error, d, examples)[group], _blocks(expected, d, examples)[group])
    )
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


def _is_small(error: Tensor, whole: Tensor) -> bool:
    """Beside ``whole``: a few hundred roundings."""
    tolerance = min(SAME_IN_LOW_PRECISION, 1e3 * torch.finfo(whole.dtype).eps)
    return bool(error.double().norm() <= tolerance * whole.double().norm())


# The forward probe

# No example changed another; likewise, but some input could not be changed; one did; nothing with rows went in or came
# out; what came out does not depend on what went in; twice the same gave two results; one that is not finite makes
# others so.
Verdict = Literal["apart", "partly", "mixed", "unseen", "unmoved", "unrepeatable", "spoiled"]


@dataclass(frozen=True)
class Synthetic:
    """Synthetic rows in place of a batch's; those of the examples ``changed`` are others.

    rows: N, how many the batch has, and keeps; augmult: K. Each tensor holds its rows along dimension 0 or 1 if that
    has N entries, or else along dimension 0 if that has B = N / K, one for each example. Others are left as they are.
    numbers: between 0.1 and 1 (quiet), of both signs and some of them large (loud), or NaN in what is changed (broken).
    """

    rows: int
    augmult: int
    numbers: Literal["quiet", "loud", "broken"] = "quiet"
    changed: frozenset[int] = frozenset()

    @property
    def examples(self) -> int:
        return self.rows // self.augmult

    def dim(self, t: Tensor) -> int | None:
        """The dimension that holds rows."""
        found = next((d for d, size in enumerate(t.shape[:2]) if size == self.rows), None)
        per_example = found is None and t.ndim > 0 and t.shape[0] == self.examples > 1
        return 0 if per_example else found

    def square(self, t: Tensor) -> bool:
        """Whether a second dimension looks the same."""
        return t.ndim > 1 and t.shape[0] == t.shape[1] == self.rows

    def __call__(self, t: Tensor) -> Tensor:
        """Floating-point numbers become uniform random ones; whole numbers (labels, tokens) change places."""
        dim = self.dim(t)
        if dim is None:
            return t
        rows = t.movedim(dim, 0)
        mine = self.of(self.changed, len(rows))
        new = self._floats(rows, mine) if t.is_floating_point() else self._wholes(rows, mine)
        return new.movedim(0, dim)

    def _floats(self, rows: Tensor, mine: list[int]) -> Tensor:
        generator = torch.Generator(rows.device).manual_seed(0)
        if self.numbers == "loud":
            first, other = 3 * torch.randn(2, *rows.shape, generator=generator, device=rows.device)
            other = 10 * other
        else:
            first, other = 0.1 + 0.9 * torch.rand(2, *rows.shape, generator=generator, device=rows.device)
            other = torch.full_like(other, math.nan) if self.numbers == "broken" else other
        first[mine] = other[mine]
        return first.to(rows.dtype)

    def _wholes(self, rows: Tensor, mine: list[int]) -> Tensor:
        """Another row in the place of each; where all are equal, the next smaller numbers (a label is below C)."""
        new = rows.clone()
        for row in mine:
            others = (rows != rows[row]).reshape(len(rows), -1).any(1).nonzero()
            if len(others):
                new[row] = rows[others[row % len(others), 0]]
            else:
                new[row] = ~rows[row] if rows.dtype == torch.bool else (rows[row] - 1).clamp(min=0)
        return new

    def of(self, examples: Iterable[int], rows: int) -> list[int]:
        """Those of ``rows`` rows that belong to the examples."""
        each = rows // self.examples
        return [row for example in sorted(examples) for row in range(example * each, (example + 1) * each)]


def changed_examples(examples: int, seed: int | None) -> list[frozenset[int]]:
    """Which examples the probe changes together: a random half, the others and, without a seed, the first, the last.

    A half finds what one example among many does to the rest; one alone, what two changes would hide.
    """
    everyone = range(examples)
    half = frozenset(random.Random(seed or 0).sample(everyone, examples // 2))
    alone = [frozenset({0}), frozenset({examples - 1})] if seed is None else []
    return [half, frozenset(everyone) - half, *alone]


def forward_verdict(
    run: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch: Synthetic,
    public: Callable[[Tensor], bool] = lambda _: False,
    seed: int | None = None,
) -> Verdict:
    """``run(*args, **kwargs)`` on synthetic rows, changing some examples: the output of the others must not change.

    ``run`` must give the same for the same. public: tensors that may be no rows (a causal mask): where everything else
    keeps examples apart, they are left as they are. seed: of the examples that are changed (None: the first time).
    Nothing that depends on the inputs' values leaves this function but the verdict.
    """
    whole = (tuple(args), dict(kwargs))
    verdict = _verdict(run, whole, batch, seed)
    if verdict == "mixed" and any(map(public, tensors_in(whole))):
        second = _verdict(run, whole, batch, seed, leave=public)
        return second if second in ("apart", "partly") else "mixed"
    return verdict


def thorough_verdict(
    probe: Callable[[Synthetic], Verdict], batch: Synthetic, without_hiding: Callable[[], AbstractContextManager[bool]]
) -> Verdict:
    """The verdict of ``probe`` on quiet input; on loud input with weights that hide nothing; and on broken input.

    without_hiding: a context with such weights, which says whether there are others. Loud or broken input that the
    model cannot run on tells nothing.
    """
    said = probe(batch)
    if said not in ("apart", "partly", "unmoved"):
        return said
    with without_hiding() as some_hid:
        for numbers in ("loud", "quiet") if some_hid else ("loud",):
            again = _if_it_runs(probe, replace(batch, numbers=numbers))
            if again == "mixed" or (said == "unmoved" and again in ("apart", "partly")):
                said = again
    return "spoiled" if said != "mixed" and _if_it_runs(probe, replace(batch, numbers="broken")) == "mixed" else said


def _if_it_runs(probe: Callable[[Synthetic], Verdict], batch: Synthetic) -> Verdict:
    try:
        return probe(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return "unseen"


def is_mask(t: Tensor) -> bool:
    """A square of nothing but 0 and hugely negative numbers, or of truth values on one side of its diagonal."""
    if t.ndim != 2 or t.shape[0] != t.shape[1]:
        return False
    if t.dtype == torch.bool:
        return any(torch.equal(t, half) or torch.equal(~t, half) for half in (t.tril(), t.triu()))
    return t.is_floating_point() and bool(((t == 0) | (t <= -1e4)).all())


def _verdict(
    run: Callable[..., Any],
    whole: Any,
    batch: Synthetic,
    seed: int | None,
    leave: Callable[[Tensor], bool] = lambda _: False,
) -> Verdict:
    def given(changed: frozenset[int]) -> Any:
        synthetic = replace(batch, changed=changed)
        return replace_tensors(whole, lambda t: t if leave(t) else synthetic(t))

    def outputs(inputs: Any) -> list[Tensor]:
        args, kwargs = inputs
        return [t for t in tensors_in(run(*args, **kwargs)) if t.ndim]

    usual = given(frozenset())
    before = outputs(usual)
    dims = [batch.dim(t) for t in before]
    if all(dim is None for dim in dims):
        return "unseen"
    if any(_differs(one, other) for one, other in zip(before, outputs(usual), strict=True)):
        return "unrepeatable"
    idle = {i for i, t in enumerate(tensors_in(whole)) if batch.dim(t) is not None and not leave(t)}
    held, moved = len(idle), False
    for changed in changed_examples(batch.examples, seed):
        inputs = given(changed)
        pairs = enumerate(zip(tensors_in(usual), tensors_in(inputs), strict=True))
        idle -= {i for i, (one, other) in pairs if i in idle and not torch.equal(one, other)}
        for dim, one, other in zip(dims, before, outputs(inputs), strict=True):
            if dim is None:
                continue
            if one.shape != other.shape:
                return "mixed"
            mine = torch.zeros(one.shape[dim], dtype=torch.bool, device=one.device)
            mine[batch.of(changed, len(mine))] = True
            one, other = one.movedim(dim, 0), other.movedim(dim, 0)
            if _differs(one[~mine], other[~mine]):
                return "mixed"
            moved |= not torch.equal(one[mine], other[mine])
    if len(idle) == held:
        return "unseen"
    if not moved:
        return "unmoved"
    return "partly" if idle else "apart"


def _differs(before: Tensor, after: Tensor) -> bool:
    """Beyond rounding, entry by entry: one huge entry (a mask's) must not hide the others."""
    if before.shape != after.shape or not before.is_floating_point():
        return not torch.equal(before, after)
    finite = before.isfinite()
    if not torch.equal(finite, after.isfinite()):
        return True
    eps = torch.finfo(before.dtype).eps
    before, after = before[finite].double(), after[finite].double()
    if not before.numel():
        return False
    scale = torch.maximum(before.abs(), after.abs())
    tolerance = (100 * eps if eps < 1e-5 else eps) * scale.clamp(min=scale.median().item())
    return bool(((before - after).abs() > tolerance).any())
