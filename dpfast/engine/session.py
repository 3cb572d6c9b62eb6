"""Session: what one batch goes through, from the private loader to ``optimizer.step()``."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping import GhostClipper
from dpfast.clipping.calls import no_trace_left
from dpfast.clipping.problems import listed, refuse
from dpfast.clipping.trees import replace_tensors, tensors_in
from dpfast.engine.beside import Beside
from dpfast.engine.between import Between
from dpfast.engine.outputs import Cut, Reduction, cut, reached_beside, roots, scale_of_sum, surrogate_losses, unrowed
from dpfast.engine.padding import Padded
from dpfast.engine.shadows import World, gradient_in_all
from dpfast.errors import CaptureError, PrivacyError
from dpfast.privacy import Ledger
from dpfast.ranks import Ranks

MOST_PATHS = 64  # of the user's code that are looked at as soon as they are met
_WITHOUT_NOISE = (
    "the loss reaches tensors that require gradients and are no parameters of the private model: they would be trained"
    " on private data without noise. Make them parameters of the module before make_private (a criterion's weights, a"
    " temperature), or detach them"
)
_LOADER = "take batches from the data loader that make_private returned; with accelerate, after prepare"


@dataclass(frozen=True)
class Draw:
    """One physical batch of the loader: how many examples it has, and whether it is the first or the last of its
    Poisson sample.
    """

    examples: int
    first: bool = True
    last: bool = True


class Session:
    """Knows the batch that the loader gave last, and refuses what would not be one private step for each sample.

    clipper: of the module. reduction: how the user's losses are reduced over the rows of a physical batch. batches: of
    the loader in each step, where the user's loop accumulates gradients: its losses are divided by that number, and
    ``optimizer.step()`` need not be called for all but the last.
    """

    def __init__(self, clipper: GhostClipper, reduction: Reduction, batches: int = 1) -> None:
        self.clipper, self.reduction, self.batches = clipper, reduction, batches
        self._between = Between(self)
        self.ranks = Ranks.current()
        self.samples = 0  # that were begun: ranks train on parts of one and the same
        self._going_on: Ledger | None = None  # one that had steps before
        self._draw: Draw | None = None
        self._beside: Beside | None = None  # of the batch, or the last one that is gone
        self._dealt = 0  # physical batches
        self._due = False  # whether the next batch is to show that the user's code keeps examples apart
        self._shown: set[int] = set()  # traces of what the user's code called, and which it did
        self._met: set[int] = set()  # those that were met, and not looked at yet
        self._warned: set[str] = set()
        self._cuts: list[Cut] = []
        self._leaves: list[Tensor] = []  # of the cuts, also after loss.backward()
        self._summed = False  # whether the batch's clipped gradients are in p.grad, or it has no examples
        self._held = False  # whether p.grad holds sums of which no step was made
        self._skipped = False  # whether more of the same sample is to come after the last optimizer.step()
        self._lost = ""  # why no step can be made of the sample any more
        self._open = False  # whether the clipper's block is

    @property
    def module(self) -> nn.Module:
        """The user's."""
        return self.clipper.model

    # Going on after an interruption

    def go_on_from(self, ledger: Ledger) -> None:
        """``ledger`` may have steps that an interrupted process has taken."""
        self._going_on = ledger if ledger.charged_steps else None

    def is_spent(self) -> bool:
        """Whether nothing is left of a budget of which an interruption has lost steps: the loader ends there."""
        if self._going_on is None or self._going_on.charged_steps < self._going_on.plan.steps:
            return False
        self._warn(
            f"all {self._going_on.plan.steps} planned steps are charged, those that an interruption has lost included:"
            " the private loader ends here, and gives no more batches"
        )
        return True

    # The loader's side

    def deal(self, draw: Draw, padded: Padded) -> None:
        """``draw``, the examples of a batch, is what the loader gives now."""
        self.close()
        self._look_beside(draw, padded)
        self._draw, self._summed = draw, False
        self.samples += draw.first
        if draw.first:
            self._skipped, self._lost = False, ""
        self._between.open()

    def check_next(self) -> None:
        """Have the next batch show that the user's code keeps examples apart: otherwise it is those of the numbers 1,
        2, 4, 8, ..., and those after a batch with which that code called other functions than ever before.
        """
        self._due = True

    def _look_beside(self, draw: Draw, padded: Padded) -> None:
        self._dealt += 1
        self._due |= self._dealt & (self._dealt - 1) == 0
        self._beside = Beside(padded.batch, draw.examples, self.clipper.augmult, self.reduction, self._beside)
        if self._due:
            self._beside.exchange_halves(padded.batch)
        if padded.other is not None:
            self._beside.pad_less(padded)
        self._between.begin(self._beside.worlds)

    def take_back(self) -> None:
        """The loader is asked for the next batch, in the same loop.

        Raises ``PrivacyError`` if what it gave last was trained on, and no step was made of it.
        """
        draw = self._draw
        used = draw is not None and bool(self._leaves or self._summed)
        used |= draw is not None and draw.last and self.ranks.size > 1  # other ranks make a step of their parts
        if used and self._summed and self._draw is not None and not self._draw.last and self.batches > 1:
            self._skipped, used = True, False  # more of the sample follows, to be accumulated
        self.close()  # only now: what the user's code keeps of a batch may be computed after the step
        if used:
            self._held = False
            self.clipper.zero_grad()  # no one else's to read
            raise PrivacyError(
                "the loader was asked for another batch, and optimizer.step() was not called for the last one: every"
                " batch it gives is one step, also where a loss is not finite (what is left out would depend on the"
                " data). To accumulate gradients, give the DataLoader the whole batch_size and wrap the loop in"
                " dpfast.engine.BatchMemoryManager"
            )

    def close(self) -> None:
        """Whatever is open is left, as after an exception."""
        for world in self._between.worlds:
            world.readings.is_open = False
        self._between.close()
        self._end()

    def _end(self) -> None:
        """Of the batch."""
        self._leave(CaptureError("left"))
        self._draw, self._cuts, self._leaves = None, [], []
        if not self._held and not self._between.worlds:
            self._between.close()

    # The model's side

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the module in training."""
        draw = self._draw
        if draw is None:
            raise PrivacyError(
                "the private model was called in training without a batch of its own: each batch is one step"
                f" ({_LOADER}, and its BatchMemoryManager from dpfast.engine). To look at its outputs: model.eval(), or"
                " torch.no_grad()"
            )
        if self._summed:
            raise PrivacyError(
                "the private model was called in training after loss.backward(): call it before, add up all losses of"
                " the batch, and call backward() once. To look at its outputs: model.eval(), or torch.no_grad()"
            )
        self._refuse_leftovers()
        with self._between.within(watched=self._beside is not None and bool(self._beside.halves)):
            if not draw.examples:
                return self._forward_of_nothing(args, kwargs)
            assert self._beside is not None
            self._beside.see_inputs((args, kwargs))
            self._beside.see_module(self.module)
            with self._block():
                output = self.module(*args, **kwargs)
            output, cuts, stand_ins = cut(output, self._rows(draw))
            self._see_outputs(cuts)
            self._beside.see_outputs(self.module, (args, kwargs), output, cuts, stand_ins)
            self._cuts += cuts
            self._leaves += [one.leaf for one in cuts]
            return output

    def see_inside(self, given: Any) -> None:
        """What a call inside of the private model is given: it may come from the user's code by another way."""
        if self._beside is not None:
            self._beside.see_inputs(given)

    def _rows(self, draw: Draw) -> int:
        return draw.examples * self.clipper.augmult

    def _refuse_leftovers(self) -> None:
        if self._held and self._draw is not None and self._draw.first:
            raise PrivacyError(
                "gradients of an earlier batch are still there, of which no step was made: call optimizer.zero_grad()"
                " before, or optimizer.step() for each batch"
            )

    def _see_outputs(self, cuts: list[Cut]) -> None:
        if cuts and not any(one.has_rows for one in cuts):
            self._leave(CaptureError("refused"))
            raise CaptureError(
                "no output of the model has a row for each of the batch's along its first dimension: expected"
                f" [B*{self.clipper.augmult}, ...], the rows of exactly the batch that the private loader gave last."
                f" Give the model that whole batch ({_LOADER}), and have it return results row by row, batch first"
            )

    def _forward_of_nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outputs of 0 rows: of one row of zeros, cut down. Many layers cannot run on none."""

        def one_row(t: Tensor) -> Tensor:
            return t.new_zeros((1, *t.shape[1:])) if t.ndim and not len(t) else t

        def no_row(t: Tensor) -> Tensor:
            t = t[:0] if t.ndim and len(t) == 1 else t
            if not t.is_floating_point():
                return t
            self._leaves.append(t.detach().requires_grad_())
            return self._leaves[-1].clone()

        with torch._C.DisableTorchFunction(), no_trace_left(self.module):
            given, named = replace_tensors((args, kwargs), one_row)
            output = self.module(*given, **named)
        return replace_tensors(output, no_row)

    # loss.backward()

    def backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A backward pass of the user's, of a private loss or another."""
        draw = self._draw
        losses, gradient = roots(args, kwargs)
        if draw is None:
            return func(*args, **kwargs)
        at_cut, others, inside = reached_beside(losses, self._leaves)
        own = {id(p): name for name, p in self.clipper.parameters.items()}
        reached = [own[id(t)] for t in others if id(t) in own]
        if inside or reached:
            names = f" ({listed(reached)})" if reached else ""
            raise CaptureError(
                f"the loss reaches parameters of the private model{names} other than through what model(...) returned:"
                " that gradient would not be clipped. Leave penalties on weights to the optimizer (weight_decay), call"
                " the model that make_private returned and none of its parts, and use a weight twice inside the model"
            )
        if others and (at_cut or (self._beside is not None and self._beside.knows(losses))):
            raise CaptureError(_WITHOUT_NOISE)
        if not at_cut:
            return func(*args, **kwargs)
        if self._summed:
            raise PrivacyError(
                "a second backward() for one batch: each would be clipped by itself. Add up all losses of the batch and"
                " call backward() once"
            )
        if kwargs.get("create_graph") or kwargs.get("inputs") is not None or any(args[3:]):  # by position
            raise CaptureError(
                "backward() of a private loss takes neither create_graph nor inputs: second derivatives of private data"
                " are not supported"
            )
        if draw.examples:
            self._clip(draw, losses, gradient)
        self._summed = self._held = True
        return None

    def gradient(self, worlds: list[World], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gradient that the user's code takes for itself."""
        values = tensors_in((args[:1], kwargs.get("outputs")))
        by = tensors_in((args[1:2], kwargs.get("inputs")))
        if worlds and any(isinstance(t, nn.Parameter) for t in by):
            raise CaptureError(_WITHOUT_NOISE)
        try:
            return gradient_in_all(worlds, func, args, kwargs)
        except RuntimeError as error:
            at_cut, _, _ = reached_beside(values, self._leaves)
            if not at_cut:
                raise
            raise CaptureError(
                "torch.autograd.grad: what the private model returns in training is cut off from its inputs. A gradient"
                " penalty is not supported (second derivatives of private data); for gradients of inputs alone, call"
                " the model in eval mode"
            ) from error

    def see_read_of_sums(self, parameter: Tensor) -> None:
        """Raises ``PrivacyError`` where ``parameter.grad`` holds a sum of clipped gradients."""
        if self._held and any(parameter is p for p in self.clipper.parameters.values()):
            raise PrivacyError(
                "p.grad of the private model was read between loss.backward() and optimizer.step(): it is the sum of"
                " clipped gradients, to which step() adds the noise, and no number computed from it (a norm for the"
                " log, a learning rate) is covered by epsilon. Leave p.grad alone, use neither GradScaler nor"
                " clip_grad_norm_ (gradients are clipped already), and clear with optimizer.zero_grad()"
            )

    def _clip(self, draw: Draw, losses: list[Tensor], gradient: list[Tensor | None]) -> None:
        rows = self._rows(draw)
        scale = self.batches * scale_of_sum(losses, gradient, rows, self.reduction, self.clipper.augmult)
        cuts, self._cuts = self._cuts, []
        try:
            with torch._C.DisableTorchFunction():
                gradients = self._gradients(cuts, losses, gradient)
                refuse(unrowed(cuts, gradients))
                surrogates = surrogate_losses(cuts, gradients, rows, scale)
            self.clipper.resume()
            self.clipper.backward(surrogates)
        except BaseException as error:
            self._leave(error)
            raise
        self._open = False
        self.clipper.__exit__(None, None, None)

    def _gradients(
        self, cuts: list[Cut], losses: list[Tensor], gradient: list[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Of the losses, by what the model returned."""
        assert self._beside is not None
        cotangents = [torch.ones_like(loss) if g is None else g for loss, g in zip(losses, gradient, strict=True)]
        leaves, worlds = [one.leaf for one in cuts], self._beside.worlds
        found = torch.autograd.grad(losses, leaves, cotangents, retain_graph=bool(worlds), allow_unused=True)
        self._beside.see_gradients(cuts, losses, cotangents, found)
        self._note_shown()
        return found

    def _note_shown(self) -> None:
        """That the batch has shown what it can."""
        assert self._beside is not None
        trace = self._between.trace
        for message in self._beside.not_shown():
            self._warn(message)
        if self._beside.halves:
            self._shown.add(trace)
            self._met.discard(trace)
            self._due = bool(self._met) or self._beside.is_in_doubt
            if not self._beside.is_in_doubt:
                self._beside.doubts.clear()  # which one that follows at once is to confirm
        elif trace not in self._shown and len(self._shown) + len(self._met) < MOST_PATHS:
            self._met.add(trace)
            self._due = True

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    # The optimizer's side

    def check_settings_of(self, groups: list[dict[str, Any]]) -> None:
        """Raises ``PrivacyError`` where a learning rate, say, is known to be computed from a batch."""
        settings = [value for group in groups for name, value in group.items() if name != "params"]
        if any(world.knows(settings) for world in self._between.worlds):
            raise PrivacyError(
                "optimizer.step(): a setting of the optimizer (the learning rate?) is computed from a batch, and would"
                " take private numbers into the update: let it follow a schedule, or what is measured on public data"
            )

    def begin_step(self) -> bool:
        """Whether ``optimizer.step()`` is to make an update now, or more of the sample is to come.

        Raises ``PrivacyError`` when the sums are not those of the batch.
        """
        draw = self._draw
        if draw is None:
            raise PrivacyError(
                "optimizer.step(): expected one batch of the private loader since the last step, got none. Each batch"
                f" is one step ({_LOADER})"
            )
        if not draw.examples and not self._summed:
            self._summed = self._held = True  # of no examples, whose losses need not even be computed
        if not self._summed:
            raise PrivacyError(
                "optimizer.step(): expected one loss.backward() for the batch before it, got none (was the loss"
                " computed from what the private model returned, in training mode, and back-propagated in the same"
                " thread?)"
            )
        with torch._C.DisableTorchFunction():
            gone = draw.examples and any(p.grad is None for p in self.clipper.parameters.values())
        if self._lost or gone:
            self._between.close()
            self._draw = None
            raise PrivacyError(
                "optimizer.step(): the gradients of the batch were cleared after loss.backward() (by zero_grad()?), so"
                " that the update would be of noise alone: call zero_grad() after step(), or before backward()"
            )
        self._skipped = not draw.last
        if self._skipped:
            self._end()
        return draw.last

    def end_step(self, *, charged: bool) -> None:
        """After an update, or an error in its place."""
        self._held = self._held and not charged
        self._end()

    def zero_grad(self) -> None:
        """Clear the sums; between the physical batches of one sample they are kept, as Opacus does."""
        if self._summed and self._draw is not None:
            self._lost = "cleared"
        elif self._between_parts():
            return
        self._held = False
        self.clipper.zero_grad()

    def _between_parts(self) -> bool:
        """Whether some physical batches of a sample were summed, and others are to come."""
        return self._skipped and not self._lost and (self._draw is None or not self._draw.first)

    # The clipper's block

    def _block(self) -> "_Block":
        return _Block(self)

    def _enter(self) -> None:
        if self._open:
            self.clipper.resume()
        else:
            self.clipper.__enter__()
            self._open = True

    def _leave(self, error: BaseException) -> None:
        """Leave the clipper's block, if it is open, as ``error`` would."""
        if self._open:
            self._open = False
            self.clipper.__exit__(type(error), error, None)


class _Block:
    """The clipper's block, for one call of the model: open, and then paused until the next or ``backward()``."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session._enter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._session.clipper.pause()
        else:
            self._session._leave(error)
