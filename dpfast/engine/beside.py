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

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping.rounding import differ, of_columns, real
from dpfast.clipping.trees import TensorMap, replace_tensors, tensors_in
from dpfast.engine.batches import Entries, copied, parts_of, rows_at, rows_dim, tensors_of
from dpfast.engine.compare import roughness, rows_apart
from dpfast.engine.exchange import exchanged_halves
from dpfast.engine.fewer import Fewer
from dpfast.engine.outputs import Cut, Reduction, evaluated, reached_beside
from dpfast.engine.padding import REACHES, UNSEEN, Padded, Shorter
from dpfast.engine.readings import Followed
from dpfast.engine.shadows import World
from dpfast.errors import PrivacyError

_COARSE = 0.03  # of gradients that may be halved in bfloat16
_FAINT = 1e-6  # of the largest row's gradient: rounding of what all rows have in common

_CURE = (
    "Compute the loss of each example from its own rows: no statistics, means over tokens of all examples, counts of"
    " labels or negatives of the batch, not even behind detach(); keep nothing of one batch for the next. (Losses of"
    " torch with weight= or ignore_index divide by the weights of the whole batch: reduction='none', then a mean of"
    " each example's)"
)

_DIVIDED = (
    'loss_reduction="sum", and the loss that was back-propagated seems to be divided by a multiple of how many examples'
    " are in the batch, on which what an example contributes would then depend"
)
_NEITHER = (
    "the loss that was back-propagated is neither a mean nor a sum over the rows of the batch (a sum of both, or"
    " divided by another number), so that what an example contributes depends on how many there are. Reduce all alike"
)


class Beside:
    """The worlds of one batch of B examples of K rows each."""

    def __init__(self, batch: Any, examples: int, augmult: int, reduction: Reduction, earlier: "Beside | None") -> None:
        """earlier: of the batch before, whose tensors that are left are other than they are in a world of this one."""
        self.examples, self.augmult, self.reduction = examples, augmult, reduction
        self.halves: list[World] = []
        self.fewer: Fewer | None = None
        self.shorter: Shorter | None = None
        self.past: World | None = None if earlier is None else _left_of(earlier)
        self.doubts: dict[str, list[set[float]]] = {} if earlier is None else earlier.doubts
        self.is_in_doubt = False  # whether another batch is to confirm what this one shows
        self.batch = TensorMap()
        self.batch.update(tensors_of(batch))
        self.gone: TensorMap = TensorMap() if earlier is None else earlier.batch  # of the batch before
        self.saw_inputs = False

    @property
    def worlds(self) -> list[World]:
        """All of them."""
        others = (self.past, self.fewer, self.shorter)
        return [*self.halves, *(world for world in others if world is not None)]

    def not_shown(self) -> Iterator[str]:
        """What this batch was looked at for in vain, in words."""
        if self.shorter is not None and self.shorter.lost:
            yield f"{UNSEEN}: {self.shorter.lost}"
        why = next((world.lost for world in self.halves if world.lost), "")
        if self.halves and not why and not self.saw_inputs:
            why = "what the model is given was not seen to be computed from the batch"
        if why:
            yield (
                f"it was not shown that the code around the private model keeps examples apart: {why}. Numbers must not"
                " leave torch on their way from the loader's batch to the model, and from its outputs to the loss"
            )
        elif self.fewer is not None and self.fewer.lost and self._is_confirmed("fewer", {self.examples}):
            yield (
                f"it was not shown that the loss is a {self.reduction} over the rows of the batch, as"
                f' loss_reduction="{self.reduction}" says: {self.fewer.lost}. What an example contributes must not'
                " depend on how many there are"
            )
        if self.past is not None and self.past.lost:
            yield f"it was not shown that nothing is kept of one batch for the next: {self.past.lost}"

    def _refuse(self, world: World, message: str, about: set[float] | None = None) -> None:
        """Raises ``PrivacyError``; what may be chance only where a second batch says the same.

        about: numbers which it may be the chance of; those that were guessed at in the world by default.
        """
        about = world.readings.used if about is None else about
        if not about or self._is_confirmed(message, about):
            raise PrivacyError(message)

    def _is_confirmed(self, what: str, about: set[float]) -> bool:
        """Whether the batch before has said the same of other numbers; if not, the next is to be looked at."""
        before = self.doubts.setdefault(what, [])
        if any(not about & other for other in before):
            return True
        before.append(about)
        self.is_in_doubt = True
        return False

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
        self.fewer = Fewer(self.examples, self.augmult)
        with torch._C.DisableTorchFunction():
            for part in parts_of(batch, self.examples, self.augmult):
                for world in self._of_others:
                    with world.may_be_lost("the batch"):
                        self._exchange(part, world)

    def _exchange(self, part: Any, world: World) -> None:
        """The rows, or entries of a list, that ``part`` of the batch has in a world."""
        if isinstance(part, Tensor):
            dim = rows_dim(part, self.examples, self.augmult)
            if dim is not None:
                world.shadows[part] = world.rows(part.detach(), dim, part.shape[dim] // self.examples)
        elif isinstance(part, Entries):
            there = [part[row] for row in rows_at(world.places or [], len(part) // self.examples).tolist()]
            if isinstance(world, Fewer):
                world.absent.update(tensors_in(part[len(there) :]))
            for here, instead in zip(part, there, strict=False):
                if here is not instead:
                    world.note(here, replace_tensors(instead, lambda t: copied(t.detach())))

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
                if world in (*self.halves, self.past) and world.readings.differ(given):
                    raise PrivacyError(
                        "the model is given a number that was read from the batch (by item(), say): give it a tensor"
                        " with a row for each example, computed from that example alone"
                    )

    def see_module(self, module: nn.Module) -> None:
        """Raises ``PrivacyError`` if the user's code has put something of the batch into the module itself."""
        with torch._C.DisableTorchFunction():
            worlds = [world for world in (*self.halves, self.past) if world is not None and not world.lost]
            for name, part in module.named_modules() if worlds else ():
                held = {**part._parameters, **part._buffers, **vars(part)}
                for own, value in held.items():
                    if isinstance(value, Tensor | Followed) and any(world.knows(value) for world in worlds):
                        raise PrivacyError(
                            f"{'.'.join(filter(None, (name, own)))} of the private model was computed from a batch by"
                            " the code around it: give the model, as arguments, rows of one example each"
                        )

    def _is_same_input(self, world: World, t: Tensor, shadow: Tensor) -> bool:
        if isinstance(world, Shorter):
            return world.is_same_input(t, shadow)
        dim = rows_dim(t, self.examples, self.augmult)
        if dim is None or t.shape != shadow.shape:
            return not differ(t[None], shadow[None], of_columns)
        ours, theirs = t.movedim(dim, 0), shadow.movedim(dim, 0)
        if world.kept is not None:
            rows = rows_at(world.kept, t.shape[dim] // self.examples, t.device)
            ours, theirs = ours[rows], theirs[rows]
        return not differ(ours, theirs, of_columns)

    def see_outputs(
        self, module: nn.Module, call: Any, given: Any, cuts: Sequence[Cut], stand_ins: Sequence[Tensor]
    ) -> None:
        """What is ``given`` to the user of a ``call`` of the ``module``, ``stand_ins`` in it for ``cuts``: in a world,
        the model's results are those of the examples there.
        """
        if self.shorter is not None and not self.shorter.lost:
            self.shorter.see_call(module, call, given, cuts, stand_ins)
        with torch._C.DisableTorchFunction():
            for world in self.halves:
                with world.may_be_lost("the model's outputs"):
                    for one, stand_in in zip(cuts, stand_ins, strict=True):
                        leaf = one.leaf.detach()
                        leaf = world.rows(leaf, 0, len(leaf) // self.examples) if one.has_rows else leaf.clone()
                        world.leaves[id(one.leaf)] = leaf.requires_grad_()
                        world.shadows[stand_in] = leaf.clone()
                    self._see_results(world, module, call, given)
            if self.fewer is not None and not self.fewer.lost:
                for one, stand_in in zip(cuts, stand_ins, strict=True):  # some rows of the real leaves
                    part = self.fewer.part_of(one.leaf)
                    self.fewer.shadows[stand_in] = one.leaf.clone() if part is None else part

    def _see_results(self, world: World, module: nn.Module, call: Any, given: Any) -> None:
        """What has no gradient: rows of the examples there, constants, or whatever no loss may depend on."""
        sizes = (self.examples * self.augmult, self.examples)
        there: list[Tensor] | None = None
        results = [(place, t) for place, t in enumerate(tensors_in(given)) if t not in world.shadows]
        held = (*module.parameters(), *module.buffers()) if results else ()
        own = {t.untyped_storage().data_ptr() for t in held}
        for place, t in results:
            if t in world.shadows or t.untyped_storage().data_ptr() in own:
                continue
            if t.ndim and t.shape[0] in sizes:
                world.shadows[t] = world.rows(t.detach(), 0, t.shape[0] // self.examples)
                continue
            if there is None:
                there = tensors_in(evaluated(module, world.there(call)))
            if not differ(t.detach()[None], there[place][None], of_columns):
                continue
            if t.ndim and len(t) and len(t) % sizes[0] == 0 and not t.is_floating_point():  # codes, several of each row
                for one in (world, self.fewer):
                    if one is not None:
                        one.shadows[t] = one.rows(t, 0, len(t) // self.examples)
            else:
                world.shadows[t] = _another(t.detach())

    def knows(self, losses: Sequence[Tensor]) -> bool:
        """Whether some are known to be computed from the batch."""
        return any(world.knows(list(losses)) for world in self.halves)

    def see_gradients(
        self,
        cuts: Sequence[Cut],
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Raises ``PrivacyError`` if the gradient of one example's rows depends on others. To be called inside of
        ``DisableTorchFunction``.
        """
        rows = self.examples * self.augmult
        if all(loss.ndim and len(loss) == rows for loss in losses):
            self.fewer = None  # nothing is reduced
        for world in self.worlds:
            found = self._gradients_there(world, cuts, losses, cotangents)
            if found is not None and isinstance(world, Fewer):
                self._see_reduction(world, cuts, losses, gradients, found)
            elif found is not None and isinstance(world, Shorter):
                if not world.are_same(cuts, gradients, found):
                    self._refuse(world, REACHES)
            elif found is not None and not self._are_same(world, cuts, gradients, found):
                where = "this batch" if world is not self.past else "the batch before"
                self._refuse(
                    world,
                    "the loss of one example depends on others: its gradient changes with what the others are in"
                    f" {where}. {_CURE}",
                )

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
        if world.leaves and reached_beside(known, [one.leaf for one in cuts])[0]:
            world.lose("a part of the loss was not seen to be computed from the batch by torch functions")
            return None
        leaves = [world.leaves.get(id(one.leaf), one.leaf) for one in cuts]
        found: Sequence[Tensor | None] | None = None
        with world.may_be_lost("its backward pass"):
            weights = [g if (shadow := world.shadow_of(g)) is None else shadow for g in cotangents]
            found = torch.autograd.grad(known, leaves, weights, retain_graph=True, allow_unused=True)
        return found

    def _see_reduction(
        self,
        world: Fewer,
        cuts: Sequence[Cut],
        losses: Sequence[Tensor],
        here: Sequence[Tensor | None],
        there: Sequence[Tensor | None],
    ) -> None:
        """Raises ``PrivacyError`` if the losses are reduced otherwise than said: by a factor that is the size of the
        batch, the gradient of each example would depend on how many there are.

        A mean makes twice as much of half as many rows, a sum as much. Division by a size that Python knows looks like
        a sum in this world. What looks like neither, or is neither, is told by a batch of another size.
        """
        assert world.places is not None
        here, there = ([_of_examples(g, self.examples, world.places) for g in side] for side in (here, there))
        scale = len(world.places) / self.examples
        halved = [None if g is None else g * scale for g in there]
        is_mean, is_sum = (self._are_same(world, cuts, here, it, rough=_COARSE) for it in (halved, there))
        if is_mean if self.reduction == "mean" else (is_sum and not world.multiples_told):
            return
        if world.multiples_told and is_sum:
            if self.reduction == "sum":
                for multiple in world.multiples_told:
                    self._refuse(world, f"{_DIVIDED} ({multiple:g} times it)", about={self.examples})
            return
        if not is_mean and not is_sum:
            if not _is_faint(cuts, losses, here):
                self._refuse(world, _NEITHER, about={self.examples})
            return
        found, said = ("mean", "sum") if is_mean else ("sum", "mean")
        self._refuse(
            world,
            f'loss_reduction="{said}", and the loss that was back-propagated is a {found} over the rows of the batch'
            f' (or a constant times that): say loss_reduction="{found}" to make_private, or reduce it so (divide by'
            " len() or shape of a tensor of the batch). Otherwise what an example contributes would depend on how many"
            " there are",
        )

    def _are_same(
        self,
        world: World,
        cuts: Sequence[Cut],
        here: Sequence[Tensor | None],
        there: Sequence[Tensor | None],
        *,
        rough: float = 1e-4,
    ) -> bool:
        """Whether the rows of kept examples have the same gradients, up to rounding."""
        examples = len(world.places) if world.places is not None else self.examples
        pairs = []
        for one, g, other in zip(cuts, here, there, strict=True):
            some = other if g is None else g
            if one.has_rows and some is not None:
                pairs.append(tuple(torch.zeros_like(some) if t is None else t for t in (g, other)))
        if not pairs:
            return True
        found = [rows_apart(g, other, examples) for g, other in pairs]
        difference, size = (torch.stack(squared).sum(0).sqrt() for squared in zip(*found, strict=True))
        allowed = roughness([g for g, _ in pairs], rough) * size + _FAINT * size.max()
        kept = slice(None) if world.kept is None else torch.tensor(world.kept, device=size.device)
        return bool((difference <= allowed)[kept].all())


def _left_of(earlier: Beside) -> World | None:
    """The world in which what is left of earlier batches is what it became with other examples there."""
    left = World(earlier=[world for world in (earlier.past, *earlier.halves[:1]) if world is not None])
    return None if left.is_real else left


def _is_faint(cuts: Sequence[Cut], losses: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """Whether gradients are no more than the rounding of what makes up the losses."""
    known = [(one.leaf, g) for one, g in zip(cuts, gradients, strict=True) if g is not None]
    moved = sum(float(real(leaf.detach()).norm() * real(g).norm()) for leaf, g in known)
    return moved <= 100 * roughness([leaf for leaf, _ in known], 0.0) * sum(
        float(loss.detach().abs().sum()) for loss in losses
    )


def _another(t: Tensor) -> Tensor:
    """With other numbers, that may be indices where the first ones are."""
    if t.is_floating_point() or t.is_complex():
        return t * torch.nan
    if t.dtype == torch.bool or not t.numel():
        return ~t
    return t.amin() + t.amax() - t


def _of_examples(g: Tensor | None, examples: int, places: Sequence[int]) -> Tensor | None:
    """The rows of some examples."""
    if g is None or not g.ndim or g.shape[0] % examples:
        return g
    return g.view(examples, -1, *g.shape[1:])[list(places)].flatten(0, 1)
