"""From terms to squared norms, clip factors and clipped sums."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from dpfast.clipping.derived import TrackedTensors, direct_uses
from dpfast.clipping.forms import Forms
from dpfast.clipping.problems import Problem, refusal
from dpfast.clipping.rows import Rows
from dpfast.clipping.rule import ClipRule
from dpfast.clipping.tape import Tape, TapedUse, place
from dpfast.clipping.terms import (
    BookKept,
    FactoredTerm,
    Joined,
    Kept,
    LinearTerm,
    Packed,
    PulledBack,
    Stored,
    Term,
    owned,
)
from dpfast.kernels import linear
from dpfast.kernels.clip import clipped_sums
from dpfast.kernels.cost import Form, Work

SMALL = 4096  # numbers of a stored gradient up to which calls cost more than its memory
LARGE = 1 << 16  # numbers of a stored gradient from which its memory costs more than a call
GRAM_TRUST = 0.01  # a Gram whose error bound exceeds this share of the squared norm is replaced by its safe side


@dataclass(frozen=True)
class Clipped:
    """Per-example norms and factors ``[B]`` and, by parameter name, ``sum_i w_i G_i``."""

    norms: Tensor
    factors: Tensor
    sums: dict[str, Tensor]


class Accumulation:
    """Collects the terms of one backward pass.

    A parameter used once keeps its term in the chosen form, also where it was moved or scaled, or its parts were used
    apart (``derived.direct_uses``). The uses of a parameter used twice, or through another derived tensor, are one
    gradient: they are materialised and summed before the norm is taken.

    kind: of step, by which ``forms`` remembers it.
    begun: gradients ``[1, *shape]`` by name of the rows that earlier passes have seen of one example; everything is
    summed then. None: all rows are here.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tracked: TrackedTensors,
        tape: Tape,
        examples: int,
        forms: Forms,
        kind: Hashable,
        device: torch.device,
        begun: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.names = {id(p): name for name, p in parameters.items()}
        self.parameters = parameters
        self.tracked = tracked
        self.tape = tape
        self.forms, self.kind = forms, kind
        self.examples = examples
        zero = torch.zeros(examples, dtype=torch.float64, device=device)
        self.sqs, self.bounds = [zero], [zero]  # of what has been measured
        self.kept: list[tuple[str, Kept]] = []
        # Gradients ``[B, *shape]`` of biases, norm affines and the like: joined later, for one call instead of many.
        self.small: dict[str, Tensor] = {}
        self.one_input: list[LinearTerm] = []  # of one input, not measured yet
        self.partial = {id(parameters[name]): grads for name, grads in (begun or {}).items()}
        self.chosen: list[tuple[str, Work, Form]] = []
        self.stored_bytes = 0
        self.direct = {} if begun is not None else direct_uses(tracked.values(), tape.times_used.__getitem__)

    def add(self, use: TapedUse, saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Tensor | None:
        """Take the terms of a use, and keep nothing that is lent; the gradient of its input where it makes that."""
        lent = {t.untyped_storage()._cdata for t in (g, *saved)} if use.lent else set[int]()
        of_input, terms = use.backward(saved, g, rows) if use.backward else (None, use.terms(saved, g, rows))
        for target, term in terms:
            if id(target) not in self.direct:
                self._add_partial(id(target), owned(term.materialise(), lent))
                continue
            name, chain = self.direct[id(target)]
            if isinstance(term, LinearTerm) and chain.is_identity and (sharing := self.tape.sharing(use, saved)) > 1:
                self._keep_of_one_input(name, owned(term, lent), sharing)
                continue
            kept = term if isinstance(term, Stored) else term.in_form(self._choose(name, term, term.work()))
            kept = owned(kept, lent)
            self._keep(name, kept if chain.is_identity else PulledBack(kept, chain))
        return of_input

    def add_whole(self, name: str, grads: Tensor) -> None:
        """Gradients ``[B, *shape]`` of a parameter, or of those rows of one example that are in this pass."""
        self._add_partial(id(self.parameters[name]), grads)

    def summed(self) -> dict[str, Tensor]:
        """Gradients ``[B, *shape]`` by name of what is summed before its norm is taken."""
        self._pull_back()
        return {self.names[key]: grads for key, grads in self.partial.items()}

    def finish(self, rule: ClipRule, mask: Tensor) -> Clipped:
        """Clip; an example where ``mask [B]`` is False contributes exactly 0."""
        self.forms.learn(self.kind, (work for _, work, _ in self.chosen))
        for name, grads in self.summed().items():
            self._keep(name, Stored(grads))
        self._measure_one_input()
        small = Joined.of(self.small) if self.small else None
        self.small.clear()
        if small:
            self._add_norms(small)
        sq, bound = torch.stack(self.sqs).sum(0), torch.stack(self.bounds).sum(0)
        # A bound that is not a number vouches for nothing: such an example contributes 0.
        total = torch.where(bound <= GRAM_TRUST * sq, sq, sq.clamp(min=0) + bound)
        factors = torch.where(mask, rule.factors(total), 0)
        sums = self._sums(factors)
        if small:
            sums |= small.clipped_sums(factors)
        return Clipped(total.sqrt(), factors, sums)

    def _sums(self, factors: Tensor) -> dict[str, Tensor]:
        """By name; a parameter used in parts has several terms. Large ones are freed once summed."""
        packed = {name: term for name, term in self.kept if isinstance(term, Packed) and term.flat.shape[1] <= LARGE}
        self.kept = [(name, term) for name, term in self.kept if name not in packed]
        totals = clipped_sums([term.flat for term in packed.values()], factors)
        sums = {name: term.spec.weight(total) for (name, term), total in zip(packed.items(), totals, strict=True)}
        while self.kept:
            name, term = self.kept.pop()
            total = term.clipped_sum(factors)
            sums[name] = sums[name] + total if name in sums else total
        return sums

    def _keep(self, name: str, term: Term) -> None:
        """Add the squared norms of a parameter's gradient, or of a part of it; ``finish`` sums it."""
        if isinstance(term, Stored) and term.known_sq is None and term.grads.numel() <= SMALL * self.examples:
            self.small[name] = term.grads
        else:
            self.kept.append((name, term))
            self._add_norms(term)

    def _add_norms(self, term: Term | Joined) -> None:
        self.sqs.append(term.sq)
        if term.bound is not None:
            self.bounds.append(term.bound)

    def _keep_of_one_input(self, name: str, term: LinearTerm, sharing: int) -> None:
        """A Gram waits until a linear map of another input comes, or the backward pass ends."""
        form = self._choose(name, term, replace(term.work(), sharing=sharing))
        if form != "gram":
            self._keep(name, term.in_form(form))
            return
        if self.one_input and place(self.one_input[0].a) != place(term.a):
            self._measure_one_input()
        self.one_input.append(term)
        self.kept.append((name, BookKept(term)))

    def _measure_one_input(self) -> None:
        if self.one_input:
            sq, bound = linear.gram_sq_norms(self.one_input[0].a, *[term.g for term in self.one_input])
            self.sqs.append(sq)
            self.bounds.append(bound)
            self.one_input.clear()

    def _choose(self, name: str, term: FactoredTerm, work: Work) -> Form:
        form = self.forms.choose(work, term.device_type, self.kind, self.stored_bytes)
        self.chosen.append((name, work, form))
        if form == "materialise":
            self.stored_bytes += work.gradients
        return form

    def _add_partial(self, key: int, grads: Tensor) -> None:
        self.partial[key] = self.partial[key] + grads if key in self.partial else grads

    def _pull_back(self) -> None:
        """Turn per-example gradients of derived tensors into those of the parameters they were computed from."""
        for derived in self.tracked.values():
            if id(derived.tensor) in self.names:
                continue
            grads = self.partial.pop(id(derived.tensor), None)
            if grads is None:
                continue
            sources = [self.parameters[name] for name in derived.names]
            try:
                pulled = torch.autograd.grad(
                    derived.tensor,
                    sources,
                    grads.to(derived.tensor.dtype),
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
            except CheckpointError as error:
                what = "what is used was computed from it inside an activation checkpoint, which cannot run again here"
                cure = "take the layer out of the checkpoint, or remove its parametrization (fold it into the weight)"
                raise refusal([Problem(derived.names, what, cure)]) from error
            for source, grad in zip(sources, pulled, strict=True):
                if grad is not None:
                    self._add_partial(id(source), grad)
