"""That the user's code around the model keeps examples apart: the batch, once more, with others in some places.

The clipper bounds what an example adds to the sum through the model. Around it the user's code may let examples meet:
in-batch negatives, a mean over the batch's tokens, weights by its labels, targets standardised over it. What comes of
that is seen by comparison with *worlds* in which half of the examples are replaced by others (``shadows``): what goes
into the model for the examples that are not replaced, and the gradient that comes back to their rows, must stay the
same. In another the batch is the real one, and what is left of those before is not (a running centre, a queue). One has
fewer examples, which shows how the losses are reduced; one less padding (``padding``).

Not seen is what no torch function shows: numbers that Python or numpy computes (what comes back as it was read is:
``readings``), functions of ``torch.compile`` and ``torch.jit``, an ``autograd.Function`` of one's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping.trees import TensorMap, leaves, tensors_in
from dpfast.engine.batches import rows_at, rows_dim, tensors_of
from dpfast.engine.exchange import exchanged_halves
from dpfast.engine.outputs import Cut, Reduction
from dpfast.engine.padding import Padded, Shorter
from dpfast.engine.shadows import World
from dpfast.errors import PrivacyError

_FAINT = 1e-6  # of the largest row's gradient: rounding of what all rows have in common

_CURE = (
    "Compute the loss of each example from its own rows: no statistics, means over tokens of all examples, counts of"
    " labels or negatives of the batch, not even behind detach(); keep nothing of one batch for the next"
)


class Beside:
    """The worlds of one batch of B examples of K rows each."""

    def __init__(self, batch: Any, examples: int, augmult: int, reduction: Reduction, earlier: "Beside | None") -> None:
        """earlier: of the batch before, whose tensors that are left are other than they are in a world of this one."""
        self.examples, self.augmult, self.reduction = examples, augmult, reduction
        self.halves: list[World] = []
        self.fewer: World | None = None  # of half of the examples
        self.shorter: Shorter | None = None
        self.past: World | None = None if earlier is None else _left_of(earlier)
        self.batch = TensorMap()
        self.batch.update(tensors_of(batch))
        self.gone: TensorMap = TensorMap() if earlier is None else earlier.batch  # of the batch before
        self.saw_inputs = False

    @property
    def worlds(self) -> list[World]:
        """All of them."""
        shorter = None if self.shorter is None else self.shorter.world
        return [*self.halves, *(world for world in (self.past, self.fewer, shorter) if world is not None)]

    @property
    def padding_unseen(self) -> str:
        """Why it was not shown that padding reaches nobody else's share, or nothing."""
        return "" if self.shorter is None else self.shorter.world.lost

    def pad_less(self, padded: Padded) -> None:
        """Make a world of the batch with less padding."""
        with torch._C.DisableTorchFunction():
            self.shorter = Shorter(padded, self.examples, self.augmult)

    def exchange_halves(self, batch: Any) -> None:
        """Make a world for each half of the examples, in which it is replaced by others of ``batch``, and one without
        it.
        """
        if self.examples < 2:
            return
        self.halves = [World(places, kept) for kept, places in exchanged_halves(self.examples)]
        self.fewer = World(self.halves[0].kept, sizes=(self.examples * self.augmult, self.examples))
        with torch._C.DisableTorchFunction():
            for t in tensors_of(batch):
                dim = rows_dim(t, self.examples, self.augmult)
                if dim is not None:
                    for world in self._of_others:
                        with world.may_be_lost("the batch"):
                            world.shadows[t] = world.rows(t.detach(), dim, t.shape[dim] // self.examples)

    @property
    def _of_others(self) -> list[World]:
        """Those of another batch than the real one."""
        return self.halves if self.fewer is None else [*self.halves, self.fewer]

    @torch.no_grad()
    def see_inputs(self, given: Any) -> None:
        """Raises ``PrivacyError`` if what goes into the model for one example depends on others."""
        if any(t in self.gone and t not in self.batch for t in tensors_in(given)):
            raise PrivacyError(
                "the model is given the batch before the last one: each batch is one step, which is made before the"
                " next is taken. To read ahead, give the DataLoader num_workers"
            )
        with torch._C.DisableTorchFunction():
            for world in (world for world in self.worlds if world is not self.fewer):
                for t in tensors_in(given):
                    shadow = None if world.lost else world.shadow_of(t)
                    if shadow is None:
                        continue
                    self.saw_inputs = self.saw_inputs or world is not self.past
                    if not self._is_same_input(world, t, shadow):
                        raise PrivacyError(
                            "the model is given a tensor computed from the batch that has not the batch's rows: give it"
                            " the whole batch, rows along the first dimension, and no numbers computed from all of it"
                            if t.ndim and rows_dim(t, self.examples, self.augmult) is None
                            else "what the model is given for one example depends on other examples (a mixture of"
                            " images, standardisation over the batch, a number computed from all of it, another order):"
                            " make each row of it of one example alone, in the batch's order, in the data set or by"
                            " numbers that are known before"
                        )
                for number in () if world.lost else leaves(given):
                    if world.readings.differ(number):
                        raise PrivacyError(
                            "the model is given a number that was read from the batch (by item(), say): give it a"
                            " tensor with a row for each example, computed from that example alone"
                        )

    def see_module(self, module: nn.Module) -> None:
        """Raises ``PrivacyError`` if the user's code has put something of the batch into the module itself."""
        with torch._C.DisableTorchFunction():
            for name, part in module.named_modules() if self.worlds else ():
                held = {**part._parameters, **part._buffers, **vars(part)}
                for own, t in held.items():
                    if isinstance(t, Tensor) and any(world.knows(t) for world in self.worlds):
                        raise PrivacyError(
                            f"{'.'.join(filter(None, (name, own)))} of the private model was computed from a batch by"
                            " the code around it: give the model, as arguments, rows of one example each"
                        )

    def _is_same_input(self, world: World, t: Tensor, shadow: Tensor) -> bool:
        if self.shorter is not None and world is self.shorter.world:
            return self.shorter.is_same_input(t, shadow)
        dim = rows_dim(t, self.examples, self.augmult)
        if dim is None or world.kept is None:
            return _alike(t, shadow)
        if t.shape != shadow.shape:
            return False
        each = t.shape[dim] // self.examples
        rows = rows_at(world.kept, each, t.device)
        return _alike(t.index_select(dim, rows), shadow.index_select(dim, rows))

    def see_call(
        self, module: nn.Module, call: Any, given: Any, cuts: Sequence[Cut], stand_ins: Sequence[Tensor]
    ) -> None:
        """What the ``module`` was called with, and what is ``given`` to the user of it."""
        if self.shorter is not None and not self.shorter.world.lost:
            self.shorter.see_call(module, call, given, cuts, stand_ins)

    def see_outputs(self, given: Any, cuts: Sequence[Cut], stand_ins: Sequence[Tensor]) -> None:
        """What is ``given`` to the user, ``stand_ins`` in it for ``cuts``: in a world, the model's results are those of
        the examples there.
        """
        rows = self.examples * self.augmult
        with torch._C.DisableTorchFunction():
            for world in self.halves:
                with world.may_be_lost("the model's outputs"):
                    for one, stand_in in zip(cuts, stand_ins, strict=True):
                        leaf = one.leaf.detach()
                        leaf = world.rows(leaf, 0, len(leaf) // self.examples) if one.has_rows else leaf.clone()
                        world.leaves[id(one.leaf)] = leaf.requires_grad_()
                        world.shadows[stand_in] = leaf.clone()
                    for t in (t for t in tensors_in(given) if t not in world.shadows):
                        if t.ndim and t.shape[0] in (rows, self.examples):
                            world.shadows[t] = world.rows(t.detach(), 0, t.shape[0] // self.examples)
                        else:  # whatever it is there, no loss may depend on it
                            world.shadows[t] = t.detach() * torch.nan if t.is_floating_point() else t.detach() + 1
            if self.fewer is not None and not self.fewer.lost:
                for stand_in in stand_ins:  # some of the same rows: of the real leaves
                    part = self.fewer.part_of(stand_in)
                    self.fewer.shadows[stand_in] = stand_in.clone() if part is None else part

    def knows(self, losses: Sequence[Tensor]) -> bool:
        """Whether some are known to be computed from the batch."""
        return any(world.knows(list(losses)) for world in self.halves)

    def see_gradients(
        self,
        cuts: Sequence[Cut],
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> str:
        """Raises ``PrivacyError`` if the gradient of one example's rows depends on others; what was not shown, in words
        or nothing. To be called inside of ``DisableTorchFunction``.
        """
        for world in self.worlds:
            found = self._gradients_there(world, cuts, losses, cotangents)
            if found is not None and world is self.fewer:
                self._see_reduction(world, cuts, losses, gradients, found)
            elif found is not None and self.shorter is not None and world is self.shorter.world:
                self.shorter.see_gradients(cuts, gradients, found)
            elif found is not None and not self._are_same(world, cuts, gradients, found):
                raise PrivacyError(
                    "the loss of one example depends on others: its gradient changes with what the others are"
                    f" {'in this batch' if world is not self.past else 'in the batch before'}. {_CURE}"
                )
        return next((world.lost for world in self.halves if world.lost), "")

    def _gradients_there(
        self, world: World, cuts: Sequence[Cut], losses: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None] | None:
        """Of the losses in a world; None where they are not known, or (in the last world) are the real ones."""
        there = [world.shadow_of(loss) for loss in losses]
        if world is self.past:
            there = [loss if shadow is None else shadow for loss, shadow in zip(losses, there, strict=True)]
        if world.lost or all(mine is loss for mine, loss in zip(there, losses, strict=True)):
            return None
        known = [loss for loss in there if loss is not None and loss.requires_grad]
        if len(known) != len(there):
            world.lose("the loss was not seen to be computed from the batch by torch functions")
            return None
        leaves = [world.leaves.get(id(one.leaf), one.leaf) for one in cuts]
        found: Sequence[Tensor | None] | None = None
        with world.may_be_lost("its backward pass"):
            weights = [g if (shadow := world.shadow_of(g)) is None else shadow for g in cotangents]
            found = torch.autograd.grad(known, leaves, weights, retain_graph=True, allow_unused=True)
        return found

    def _see_reduction(
        self,
        world: World,
        cuts: Sequence[Cut],
        losses: Sequence[Tensor],
        here: Sequence[Tensor | None],
        there: Sequence[Tensor | None],
    ) -> None:
        """Raises ``PrivacyError`` if the losses are reduced otherwise than said: by a factor that is the size of the
        batch, the gradient of each example would depend on how many there are.

        A mean makes twice as much of half as many rows, a sum as much. Division by a size that Python knows looks like
        a sum in this world.
        """
        assert world.places is not None
        if all(loss.ndim and len(loss) == self.examples * self.augmult for loss in losses):
            return
        here, there = ([_of_examples(g, self.examples, world.places) for g in side] for side in (here, there))
        scale = len(world.places) / self.examples
        is_mean = self._are_same(world, cuts, here, [None if g is None else g * scale for g in there])
        is_sum = self._are_same(world, cuts, here, there)
        if is_mean == is_sum or (is_sum and world.told) or is_mean == (self.reduction == "mean"):
            return
        found, said = ("mean", "sum") if is_mean else ("sum", "mean")
        raise PrivacyError(
            f'loss_reduction="{said}", and the loss that was back-propagated is a {found} over the rows of the batch'
            f' (or a constant times that): say loss_reduction="{found}" to make_private, or reduce it so. Otherwise'
            " what an example contributes would depend on how many there are"
        )

    def _are_same(
        self, world: World, cuts: Sequence[Cut], here: Sequence[Tensor | None], there: Sequence[Tensor | None]
    ) -> bool:
        """Whether the rows of kept examples have the same gradients, up to rounding."""
        examples = len(world.places) if world.places is not None else self.examples
        differences, sizes, rough = [], [], 1e-4
        for one, g, other in zip(cuts, here, there, strict=True):
            some = other if g is None else g
            if not one.has_rows or some is None:
                continue
            g, other = (torch.zeros_like(some) if t is None else t for t in (g, other))
            rough = max(rough, 8 * torch.finfo(one.leaf.dtype).eps)
            a, b = (t.double().reshape(examples, -1) for t in (g, other))
            finite, apart = a.isfinite() & b.isfinite(), a.isfinite() != b.isfinite()
            differences.append(torch.where(finite, a - b, 0.0).masked_fill(apart, torch.inf).square().sum(1))
            sizes.append(torch.where(finite, a, 0.0).square().sum(1))
        if not differences:
            return True
        difference, size = torch.stack(differences).sum(0).sqrt(), torch.stack(sizes).sum(0).sqrt()
        allowed = rough * size + _FAINT * size.max()
        kept = slice(None) if world.kept is None else torch.tensor(world.kept, device=size.device)
        return bool((difference <= allowed)[kept].all())


def _left_of(earlier: Beside) -> World | None:
    """The world in which what is left of earlier batches is what it became with other examples there."""
    left = World()
    for world in (earlier.past, *earlier.halves[:1]):
        if world is not None:
            left.take_over(world)
    return left if len(left.shadows) or len(left.memories) else None


def _of_examples(g: Tensor | None, examples: int, places: Sequence[int]) -> Tensor | None:
    """The rows of some examples."""
    if g is None or not g.ndim or g.shape[0] % examples:
        return g
    return g.view(examples, -1, *g.shape[1:])[list(places)].flatten(0, 1)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Up to rounding, in the norm of each entry of the first dimension."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    a, b = (t.double().reshape(len(t) if t.ndim else 1, -1) for t in (one, other))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (torch.where(t.isfinite(), t, 0.0) for t in (a, b))
    rough = max(1e-5, 4 * torch.finfo(one.dtype).eps)
    return bool(((a - b).norm(dim=1) <= rough * a.norm(dim=1)).all())
