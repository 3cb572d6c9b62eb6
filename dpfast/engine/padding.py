"""Padding to the longest example of a batch, whose length must not reach the shares of the others.

Where it shows that ``collate_fn`` pads (``collation``), the batch comes with another, in which the longest is replaced
and all are padded less. The model's outputs for the examples that stay (in eval mode, where no random numbers are
drawn), and the gradients that come back to them, must be the same there, and those of what is padding here alone be 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpfast.clipping.calls import Autocast
from dpfast.clipping.rounding import real
from dpfast.clipping.trees import tensors_in
from dpfast.engine.batches import rows_at, rows_dim, tensors_of
from dpfast.engine.compare import alike
from dpfast.engine.outputs import Cut, evaluated
from dpfast.engine.shadows import Unseen, World

UNSEEN = (
    "collate_fn pads to the longest example of the batch, and it was not shown that its length does not reach the"
    " shares of the others (mask the padding everywhere, in the model and in the loss, or pad to a fixed length)"
)
REACHES = (
    "collate_fn pads to the longest example of the batch, and its length reaches the shares of the others: the model's"
    " outputs for them, or the gradients of the loss, are others where all are padded less. Mask the padding everywhere"
    " (no means over all positions, in the model or in the loss), or pad to a fixed length"
)
_ROUGH, _LOWERED = 1e-4, 0.05  # rounding of what is computed in other shapes; under autocast


class Padded(NamedTuple):
    """A batch, and ``other``, if there is one: with less padding; the example ``places[p]`` stands in place p there,
    and those in ``kept`` are the same.
    """

    batch: Any
    kept: list[int] | None = None
    places: list[int] | None = None
    other: Any = None


def narrowings(t: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """``t`` less what is padding, on the right, then on the left: down to ``shape``; nothing where it is larger."""
    if t.ndim == len(shape) and all(size <= have for size, have in zip(shape, t.shape, strict=True)):
        yield t[tuple(slice(size) for size in shape)]
        yield t[tuple(slice(have - size, None) for size, have in zip(shape, t.shape, strict=True))]


class Shorter(World):
    """The world of a batch of ``examples`` with less padding."""

    def __init__(self, padded: Padded, examples: int, augmult: int) -> None:
        super().__init__(padded.places, padded.kept)
        self.examples, self.augmult = examples, augmult
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a cut's leaf: in eval mode, here and there
        self._rough = _ROUGH
        self.note(list(tensors_of(padded.batch)), list(tensors_of(padded.other)))

    def is_same_input(self, t: Tensor, shadow: Tensor) -> bool:
        """Whether what goes into the model for the kept examples is the same, but for padding."""
        dim = rows_dim(t, self.examples, self.augmult)
        if dim is None or rows_dim(shadow, self.examples, self.augmult) != dim:
            return False
        rows = rows_at(self.kept or [], t.shape[dim] // self.examples, t.device)
        ours, theirs = t.index_select(dim, rows), shadow.index_select(dim, rows)
        return any(self._alike(one, theirs) for one in narrowings(ours, theirs.shape))

    def see_call(
        self, module: nn.Module, call: tuple[Any, Any], output: Any, cuts: Sequence[Cut], stand_ins: Sequence[Tensor]
    ) -> None:
        """The model's ``output``, in which ``stand_ins`` are given to the user for ``cuts``."""
        if any(enabled for _, enabled, _ in Autocast().now):
            self._rough = _LOWERED
        with self.may_be_lost("the model, called in eval mode on shorter examples"):
            other = self.there(call)
            shapes = [t.shape for t in tensors_in(call)], [t.shape for t in tensors_in(other)]
            if shapes[0] == shapes[1]:
                raise Unseen("padding was not seen to go into the model")
            here, there = (tensors_in(evaluated(module, given)) for given in (call, other))
            given = tensors_in(output)
            for t, one, shorter in zip(given, here, there, strict=True):
                cut = next((cut for cut, mine in zip(cuts, stand_ins, strict=True) if mine is t), None)
                self._take(t, cut, one, shorter)

    def _take(self, given: Tensor, cut: Cut | None, here: Tensor, there: Tensor) -> None:
        """What the user was ``given``, of which the model's output in eval mode is ``here``, or ``there``."""
        t = given if cut is None else cut.leaf
        if cut is None and here.shape == there.shape and self._alike(here, there):
            return
        if t.shape != here.shape or not t.ndim or len(t) % self.examples:
            raise Unseen("an output of the model has another shape in eval mode")
        rows = rows_at(self.places or [], len(t) // self.examples, t.device)
        kept = rows_at(self.kept or [], len(t) // self.examples, t.device)
        sides = list(narrowings(t.detach()[rows], there.shape))
        if not sides:
            raise Unseen("an output of the model is longer for shorter examples")
        alike = (self._alike(one, there[kept]) for one in narrowings(here[kept], there[kept].shape))
        side = next((i for i, same in enumerate(alike) if same), 0)
        if cut is None:
            self.shadows[given] = sides[side]
            return
        leaf = self.leaves[id(cut.leaf)] = sides[side].clone().requires_grad_()
        self.shadows[given] = leaf.clone()
        self._outputs[id(cut.leaf)] = here, there

    def are_same(self, cuts: Sequence[Cut], here: Sequence[Tensor | None], there: Sequence[Tensor | None]) -> bool:
        """Whether outputs that the loss depends on, and its gradients, are the same here and in the world."""
        for one, g, other in zip(cuts, here, there, strict=True):
            outputs = self._outputs.get(id(one.leaf))
            if outputs is None or (g is None and other is None):
                continue
            g = torch.zeros_like(outputs[0]) if g is None else g
            other = torch.zeros_like(outputs[1]) if other is None else other
            kept = rows_at(self.kept or [], len(g) // self.examples, g.device)
            ours, theirs = g[kept], other[kept]
            used = [torch.where(s != 0, t[kept], 0.0) for t, s in zip(outputs, (ours, theirs), strict=True)]
            if not (self._same_but_for_zeros(ours, theirs) and self._same_but_for_zeros(*used)):
                return False
        return True

    def _same_but_for_zeros(self, longer: Tensor, shorter: Tensor) -> bool:
        """Up to rounding, where on one side there is nothing but zeros beyond."""
        whole = real(longer).square().sum()
        for one in narrowings(longer, shorter.shape):
            inside = real(one).square().sum()
            if self._alike(one, shorter) and float(whole - inside) <= 1e-9 * float(whole):
                return True
        return False

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        return alike(one, other, rough=self._rough, faint=1e-6)
