"""The forward probe: a model's calls, repeated on synthetic rows, of which some examples are changed."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpfast.clipping.rounding import differ
from dpfast.clipping.trees import replace_tensors, tensors_in

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

    def dims(self, given: Any) -> set[int]:
        """Of all tensors in it."""
        return {dim for t in tensors_in(given) if (dim := self.dim(t)) is not None}

    def first(self, t: Tensor, examples: int) -> Tensor:
        """The rows of the first examples alone."""
        dim = self.dim(t)
        return t if dim is None else t.narrow(dim, 0, t.shape[dim] // self.examples * examples)

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


def repeated_verdict(probe: Callable[[Synthetic], Verdict], batch: Synthetic, seed: int) -> Verdict:
    """The verdict of ``probe`` on quiet input, or every other time on loud input, if the model runs on that."""
    loud = _if_it_runs(probe, replace(batch, numbers="loud")) if seed % 2 else "unseen"
    return probe(batch) if loud == "unseen" else loud


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

    def unrepeatable() -> bool:
        return any(differ(one, other) for one, other in zip(before, outputs(usual), strict=True))

    def mixed() -> Verdict:
        return "unrepeatable" if seed is not None and unrepeatable() else "mixed"

    if seed is None and unrepeatable():
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
                return mixed()
            mine = torch.zeros(one.shape[dim], dtype=torch.bool, device=one.device)
            mine[batch.of(changed, len(mine))] = True
            one, other = one.movedim(dim, 0), other.movedim(dim, 0)
            if differ(one[~mine], other[~mine]):
                return mixed()
            moved |= not torch.equal(one[mine], other[mine])
    if len(idle) == held:
        return "unseen"
    if not moved:
        return "unmoved"
    return "partly" if idle else "apart"
