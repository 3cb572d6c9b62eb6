"""Row ownership is shown, not assumed.

Clipping per example bounds what one record can do only if the rows of different examples never meet. Two probes show
it:

- backward, for every pair of examples: groups of examples are back-propagated alone, and at every use the gradient
  must be zero outside the rows of the group. The groups are the bits of the examples' numbers and their complements,
  so ``2 log2(B)`` backward passes part every example from every other. This also finds the dimension of the rows.
- forward, on synthetic input: changing the rows of one example must not change the output of another (what a gradient
  cannot show: statistics over the batch behind a ``detach``).

Both are done anew when the uses, their shapes or the training modes of the model's layers change. What depends on the
values of the data (rows that meet only for certain images) no probe can exclude.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem
from dpfast.clipping.tape import Site, TapedUse
from dpfast.clipping.trees import replace_tensors, tensors_in

Signature = tuple[Any, ...]  # of a step: its uses with their shapes, and the modes of the layers
ENOUGH_STEPS = 8  # probed, when there are never gradients of half of the examples: a choice, not a measurement
MANY_PATHS = 32  # of one model: then probes are a cost to speak of
SYNTHETIC_EXAMPLES = 4  # of the forward probe: a first, a last and two in between


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

    def known(self, signature: Signature) -> dict[Site, int]:
        """Row dimensions of the uses that are settled."""
        return self.dims.setdefault(signature, {})

    def recall(self, signature: Signature, site: Site, dims: tuple[int, ...]) -> Evidence:
        """What earlier steps left of ``dims``."""
        before = self.evidence.get((signature, site))
        if before is None:
            return Evidence(dims)
        return Evidence(tuple(d for d in dims if d in before.dims), steps=before.steps)

    def settle(self, signature: Signature, evidence: Mapping[Site, Evidence], examples: int) -> list[Problem]:
        """Remember what a step has shown; a use left without a possible row dimension is a problem."""
        for site, found in evidence.items():
            found = replace(found, steps=found.steps + (len(found.informative) >= 2))
            if found.settled(examples):
                self.known(signature)[site] = found.dims[0]
                self.evidence.pop((signature, site), None)
            elif found.dims:
                self.evidence[signature, site] = found
        return [
            Problem(
                site.names,
                f"{site.function}: the gradient of one example's loss reaches rows of other examples (or the result"
                " has no dimension that holds the rows)",
                "keep examples apart along one dimension: no statistics, attention or means over the batch; register"
                " constant tensors as buffers",
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


def weigh(evidence: Evidence, g: Tensor, group: Sequence[int], examples: int) -> Evidence:
    """Evidence after the losses of ``group`` alone gave the gradient ``g`` at a use.

    Entries that are not finite say nothing: 0 * inf of another example's activation is NaN without any mixing.
    """
    touched = g.isfinite() & (g != 0)
    if not bool(touched.any()):
        return evidence
    owners = {}
    for d in evidence.dims:
        blocks = touched.movedim(d, 0).unflatten(0, (examples, -1)).flatten(1).any(1)
        owners[d] = frozenset(blocks.nonzero().flatten().tolist())
    dims = tuple(d for d in evidence.dims if owners[d].issubset(group))
    seen = evidence.informative | owners[dims[0]] if dims else frozenset()
    return replace(evidence, dims=dims, informative=seen)


# The forward probe


@dataclass(frozen=True)
class Synthetic:
    """Rows of ``SYNTHETIC_EXAMPLES`` examples in place of a batch's; those of example ``changed`` are others.

    rows: how many the batch has; augmult: K; dim: where they are.
    """

    rows: int
    augmult: int
    dim: int = 0
    changed: int | None = None

    @property
    def size(self) -> int:
        return SYNTHETIC_EXAMPLES * self.augmult

    def fits(self, t: Tensor) -> bool:
        return t.ndim > self.dim and t.shape[self.dim] == self.rows

    def __call__(self, t: Tensor) -> Tensor:
        """Floating-point numbers become uniform random ones, whole numbers (labels, timesteps) those of other rows."""
        if not self.fits(t):
            return t
        mine = slice(0, 0) if self.changed is None else self.of(self.changed)
        t = t.movedim(self.dim, 0)
        if not t.is_floating_point():
            picks = torch.arange(self.size, device=t.device) % self.rows
            picks[mine] = (picks[mine] + max(1, self.rows // 2)) % self.rows
            return t[picks].movedim(0, self.dim)
        generator = torch.Generator(t.device).manual_seed(0)
        first, other = 0.1 + 0.9 * torch.rand(2, self.size, *t.shape[1:], generator=generator, device=t.device)
        first[mine] = other[mine]
        return first.to(t.dtype).movedim(0, self.dim)

    def of(self, example: int) -> slice:
        return slice(example * self.augmult, (example + 1) * self.augmult)


# No example changed another; one did; nothing with rows went in or came out.
Verdict = Literal["apart", "mixed", "unseen"]


def forward_verdict(
    call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], batch: Synthetic
) -> Verdict:
    """Run ``call`` on synthetic examples and change each: the others' output must not change.

    Rows in dimension 0 are tried first, then in dimension 1 (sequence-first models). Nothing that depends on the
    inputs' values leaves this function but the verdict.
    """
    seen: list[Verdict] = []
    for dim in (0, 1):
        given = replace(batch, dim=dim)
        if not any(given.fits(t) for t in tensors_in((args, dict(kwargs)))):
            continue
        try:
            verdict = _verdict(call, args, kwargs, given)
        except RuntimeError as error:
            if dim:  # as many features as rows, by chance
                continue
            error.add_note(f"while showing on {SYNTHETIC_EXAMPLES} synthetic examples that the model keeps rows apart")
            raise
        if verdict == "apart":
            return verdict
        seen.append(verdict)
    return "mixed" if "mixed" in seen else "unseen"


def _verdict(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], batch: Synthetic) -> Verdict:
    whole = (tuple(args), dict(kwargs))
    devices = {t.device for t in tensors_in(whole) if t.is_cuda}

    def outputs(changed: int | None) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), torch._C.DisableTorchFunction():
            torch.manual_seed(0)
            new_args, new_kwargs = replace_tensors(whole, replace(batch, changed=changed))
            return [t for t in tensors_in(call(*new_args, **new_kwargs)) if t.ndim]

    before = outputs(None)
    dims = [next((d for d in (batch.dim, 0) if t.ndim > d and t.shape[d] == batch.size), None) for t in before]
    if all(dim is None for dim in dims):
        return "unseen"
    for changed in range(SYNTHETIC_EXAMPLES):
        others = torch.tensor([r for r in range(batch.size) if r // batch.augmult != changed])
        for dim, one, other in zip(dims, before, outputs(changed), strict=True):
            if dim is None:
                continue
            kept = others.to(one.device)
            if one.shape != other.shape or _differs(one.index_select(dim, kept), other.index_select(dim, kept)):
                return "mixed"
    return "apart"


def _differs(before: Tensor, after: Tensor) -> bool:
    if not before.is_floating_point():
        return not torch.equal(before, after)
    tolerance = 100 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool(((before - after).abs() > tolerance).any())
