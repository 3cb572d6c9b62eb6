"""Row ownership is shown, not assumed.

Clipping per example bounds what one record can do only if the rows of different examples never meet. Two probes:

- backward, until two examples have sent a gradient that is not zero through a use: the loss of one example alone is
  back-propagated, and the gradient must be zero outside that example's rows. This also finds the dimension that holds
  the rows.
- forward, once: on synthetic input, changing the rows of one example must not change the output of another (what a
  gradient cannot show: statistics over the batch behind a ``detach``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping.problems import Problem
from dpfast.clipping.tape import Site, TapedUse
from dpfast.clipping.trees import replace_tensors, tensors_in


@dataclass
class Evidence:
    """What probes have said of one use: the row dimensions still possible, and how many probes said anything.

    Two must: a causal mixture (a cumulative sum over the batch) does not show in the loss of the first example.
    """

    dims: tuple[int, ...]
    informative: int = 0

    @property
    def settled(self) -> bool:
        return not self.dims or self.informative >= 2


@dataclass
class Ownership:
    """The row dimension of every use seen so far; outlives the step, holds no tensors."""

    dims: dict[Site, int] = field(default_factory=dict)

    def pending(self, sites: Mapping[Site, TapedUse]) -> set[Site]:
        return set(sites) - set(self.dims)

    def settle(self, evidence: Mapping[Site, Evidence]) -> list[Problem]:
        """Remember what was shown; a use left without a possible row dimension is a problem."""
        for site, found in evidence.items():
            if found.informative >= 2 and found.dims:
                self.dims[site] = found.dims[0]
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


def possible_dims(use: TapedUse, g: Tensor, examples: int) -> tuple[int, ...]:
    """Dimensions of the output that can be cut into one block per example."""
    dims = use.row_dims if use.row_dims is not None else tuple(range(g.ndim))
    return tuple(d for d in dims if d < g.ndim and g.shape[d] and g.shape[d] % examples == 0)


def weigh(evidence: Evidence, g: Tensor, example: int, examples: int) -> Evidence:
    """Evidence after the loss of ``example`` alone gave the gradient ``g`` at a use.

    Entries that are not finite say nothing: 0 * inf of another example's activation is NaN without any mixing.
    """
    touched = g.isfinite() & (g != 0)
    if not bool(touched.any()):
        return evidence
    dims = []
    for d in evidence.dims:
        blocks = touched.movedim(d, 0).unflatten(0, (examples, -1)).flatten(1).any(1)
        if bool(blocks[example]) and int(blocks.sum()) == 1:
            dims.append(d)
    return Evidence(tuple(dims), evidence.informative + 1)


def forward_problems(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int, augmult: int
) -> list[Problem]:
    """Run ``model`` on two synthetic examples and change either: the other's output must not change.

    Floating-point inputs are replaced by uniform random numbers, whole numbers (labels, timesteps) by values of other
    rows. Nothing that depends on the inputs' values leaves this function but the verdict.
    """
    call = (tuple(args), dict(kwargs))
    if not any(_has_rows(t, rows) for t in tensors_in(call)):
        return []
    devices = {t.device for t in tensors_in(call) if t.is_cuda}
    outputs = []
    for changed in (None, 0, 1):
        with torch.no_grad(), torch.random.fork_rng(devices=devices), torch._C.DisableTorchFunction():
            torch.manual_seed(0)
            new_args, new_kwargs = replace_tensors(call, lambda t: _synthetic(t, rows, augmult, changed))  # noqa: B023
            outputs.append(list(tensors_in(model(*new_args, **new_kwargs))))
    kept = {0: slice(augmult, None), 1: slice(augmult)}
    for before, *after in zip(*outputs, strict=True):
        if before.ndim == 0 or before.shape[0] != 2 * augmult:
            continue
        if any(_differs(before[kept[changed]], after[changed][kept[changed]]) for changed in (0, 1)):
            what = "changing one example's input changes the model's output for another example"
            return [Problem((), what, "remove what mixes rows: statistics over the batch, even behind detach()")]
    return []


def _has_rows(t: Tensor, rows: int) -> bool:
    return t.ndim > 0 and t.shape[0] == rows


def _synthetic(t: Tensor, rows: int, augmult: int, changed: int | None) -> Tensor:
    """Two examples' rows in place of ``t``'s; those of example ``changed`` are others."""
    if not _has_rows(t, rows):
        return t
    mine = slice(0, 0) if changed is None else slice(changed * augmult, (changed + 1) * augmult)
    if not t.is_floating_point():
        picks = torch.arange(2 * augmult, device=t.device) % rows
        picks[mine] = (picks[mine] + rows // 2) % rows
        return t[picks]
    generator = torch.Generator(t.device).manual_seed(0)
    first, other = 0.1 + 0.9 * torch.rand(2, 2 * augmult, *t.shape[1:], generator=generator, device=t.device)
    first[mine] = other[mine]
    return first.to(t.dtype)


def _differs(before: Tensor, after: Tensor) -> bool:
    if not before.is_floating_point():
        return not torch.equal(before, after)
    tolerance = 100 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool(((before - after).abs() > tolerance).any())
