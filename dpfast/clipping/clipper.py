"""GhostClipper: per-example clipping for any model in any loop."""

import sys
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from dpfast.clipping.accumulate import Clipped
from dpfast.clipping.calls import ModelCalls
from dpfast.clipping.capture import Capture
from dpfast.clipping.compiled import Regions, private_compilation
from dpfast.clipping.forms import Forms
from dpfast.clipping.losses import check_losses, check_part
from dpfast.clipping.ownership import MANY_PATHS, Ownership
from dpfast.clipping.passes import Begun, Pass
from dpfast.clipping.problems import Problem, listed, refuse
from dpfast.clipping.rule import Clipping, ClipRule
from dpfast.clipping.tape import Tape
from dpfast.clipping.watch import Inventory, Seen, Standing, changed, seen
from dpfast.errors import CaptureError, ConfigError
from dpfast.kernels.precision import without_autocast
from dpfast.pace import Pace
from dpfast.performance import Performance

FEW_STEPS = 3  # that may cost more because things are shown, before it is said


@dataclass(frozen=True)
class ClipResult:
    """Per-example gradient norms ``|G_i|`` and clip factors ``w_i``, both float64 ``[B]``.

    Both are computed from private data without noise: for debugging only, never to be logged or released.
    """

    norms: Tensor
    clip_factors: Tensor

    def __repr__(self) -> str:
        return "ClipResult(private values are not shown)"


class GhostClipper:
    """Adds ``sum_i w_i G_i`` to ``p.grad``: ``G_i`` is the gradient of one example, and ``w_i = min(1, C / |G_i|)``.

    ``G_i`` is the mean over the example's K augmentations, over all trainable parameters together, as in
    Ghalebikesabi et al. (arXiv 2302.13861); row ``i*K + k`` of a batch is augmentation k of example i::

        clipper = dpfast.GhostClipper(model, max_grad_norm=1.0, augmult=K)
        with clipper:
            losses = loss_fn(model(x, t))    # one loss per row, [B*K]
            clipper.backward(losses)

    An example whose K rows are too many for the memory goes in several passes, which are one example to the clipper::

        with clipper:
            for first in range(0, K, 8):
                clipper.backward(loss_fn(model(x[first : first + 8], t[first : first + 8])), more=first + 8 < K)

    Guarantee: adding or removing one example moves the sum by at most C = ``max_grad_norm`` in Euclidean norm (up to
    float32 rounding, and up to 0.5% where a Gram is used: ``accumulate.GRAM_TRUST``), replacing one by at most 2C; an
    example whose loss or gradient is not finite contributes exactly 0. A model for which this cannot be
    shown is refused with ``CaptureError`` before any ``p.grad`` is written. Nothing is stored on the model; outside the
    block it is untouched.

    ``one_by_one``: whether autograd itself differentiates the model where that is called with no more rows than one
    example has: faster, and a mistake where the losses are of several examples (refused). Set by the form "example";
    may be changed between blocks.

    The caller owes what cannot be seen from inside the model (``DPTrainer`` sees to all of it):

    - each example is in a batch once, its K rows next to each other (``x.repeat_interleave(K, 0)``, not ``repeat``);
    - what is made of an example before the model (scaling, noise) and the weight of its losses depend on that example
      alone: no statistics of the batch, no division by their number;
    - dropout and noise come from a generator whose seed nobody knows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        augmult: int = 1,
        clipping: Clipping = "flat",
        stability: float = 0.01,
        performance: Performance | None = None,
    ) -> None:
        """
        model: any module; frozen parameters cost nothing.
        max_grad_norm: the clip norm C.
        augmult: K, the number of consecutive rows that belong to one example.
        clipping: "flat" leaves gradients shorter than C as they are; "automatic" gives all of them nearly the length C,
            ``w_i = C / (|G_i| + stability)``: C then only scales the learning rate (Bu et al., arXiv 2206.07136).
            The sensitivity is C either way.
        stability: gamma of automatic clipping, in units of a gradient's norm.
        performance: how to compute; never changes the result.

        Raises ``ConfigError`` for values out of range and ``CaptureError`` for half-precision parameters.
        """
        self._rule = ClipRule.of(max_grad_norm, clipping, stability)
        if isinstance(model, torch.jit.ScriptModule):
            raise CaptureError("a scripted model hides its operations: give the Python module it was made from")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise CaptureError(
                "DistributedDataParallel adds up gradients that are not clipped: give the module in it (model.module);"
                " DPOptimizer adds up the clipped sums of all ranks"
            )
        if augmult < 1:
            raise ConfigError(f"augmult={augmult!r}: expected at least 1 row per example")
        self.model = model
        self._augmult = augmult
        self.performance = performance or Performance()
        self._forms = Forms(self.performance)
        self._ownership = Ownership()
        self.one_by_one = self.performance.form == "example"
        self._calls = ModelCalls(model, augmult, compiles=self.performance.compile)
        self._regions = Regions(self._calls)
        self._written: dict[int, tuple[Tensor, int]] = {}  # by id of the parameter: its p.grad, and the sum of its bits
        self.writes = 0  # how many sums have been added to p.grad
        self._warned: set[str] = set()
        self._anchor, self._standing = torch.zeros((), requires_grad=True), Standing()
        self._capture: Capture | None = None
        self._paused = False
        self._begun: Begun | None = None
        self._clipped: list[tuple[weakref.ref[Tensor], int]] = []  # inputs of the block's last call, and versions
        self._last: Seen = {}  # the parameters, when the last step began
        self._fixed: Seen = {}  # buffers and frozen parameters, when they were last looked at
        self._pace = Pace()
        self._most_examples = 0  # of any step
        self._reshown = 0  # steps in which rows that data had picked had to be shown
        refuse(_model_problems(Inventory.of(model)))

    @property
    def max_grad_norm(self) -> float:
        """The clip norm C. Fixed: what was summed was clipped to it."""
        return self._rule.max_grad_norm

    @property
    def rule(self) -> ClipRule:
        """How gradients are clipped. Fixed, too."""
        return self._rule

    @property
    def augmult(self) -> int:
        """K, the rows of an example."""
        return self._augmult

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: those whose gradients are clipped together."""
        return Inventory.of(self.model).trainable

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters by name: what a step leaves as it is."""
        return Inventory.of(self.model).fixed

    def foreign_gradients(self) -> list[str]:
        """Parameters whose ``p.grad`` is neither None, nor zero, nor exactly what this clipper last wrote."""
        return self._foreign_gradients(self.parameters)

    def _foreign_gradients(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        present = {name: p for name, p in parameters.items() if p.grad is not None}
        now = seen({name: _grad(p) for name, p in present.items()})

        def mine(name: str, p: nn.Parameter) -> bool:
            grad, bits = self._written.get(id(p), (None, 0))
            return (p.grad is grad and now[name][1] == bits) or not _grad(p).any()

        return [name for name, p in present.items() if not mine(name, p)]

    def zero_grad(self) -> None:
        """Forget the accumulated sum: ``p.grad = None``, also of parameters frozen since."""
        model = Inventory.of(self.model)
        for p in (*model.trainable.values(), *model.frozen.values()):
            if p.requires_grad or id(p) in self._written:
                p.grad = None
        self._written.clear()
        self._begun = None

    def show_again(self) -> None:
        """Have it shown with the next batch that examples stay apart, if anything has changed since it was: otherwise
        it is after 1, 2, 4, 8, ... updates, or as soon after that as it takes 0.5% of the time (``dpfast.pace``).
        ``DPOptimizer`` asks for it before the last step of the plan.
        """
        self._pace.insist()

    def __enter__(self) -> Self:
        if self._capture is not None:
            raise CaptureError("this clipper is already active: leave its `with` block before entering it again")
        model = Inventory.of(self.model)
        refuse(_model_problems(model) + _shard_problems(model))
        self._clipped = []
        self._buffers = seen(model.fixed)
        if self._fixed:
            self._see_fixed(self._buffers)
        self._kept = model.buffers
        self._copies = {name: b.detach().clone() for name, b in model.buffers.items()}
        self._parameters: Seen | None = None
        self._see_parameters(model)
        self._capture = Capture(model.trainable, model.fixed, self._anchor, self._see_parameters, self._standing)
        self._compilation = private_compilation()
        compiles = self._compilation.__enter__()
        self._calls.begin(self._capture, model.modules, one_by_one=self.one_by_one, compiles=compiles)
        self._regions.begin(self._capture)
        self._capture.__enter__()  # type: ignore[no-untyped-call]
        self._paused = False
        return self

    def pause(self) -> None:
        """Inside the block: what is called until ``resume`` is no part of the step, and is not seen."""
        if self._capture is None or self._paused:
            raise CaptureError("clipper.pause: expected an active clipper that is not paused")
        self._capture.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._compilation.__exit__(None, None, None)
        self._calls.pause()
        self._paused = True

    def resume(self) -> None:
        """Go on with the step after ``pause``."""
        if self._capture is None or not self._paused:
            raise CaptureError("clipper.resume: expected a paused clipper")
        self._compilation = private_compilation()
        self._compilation.__enter__()
        self._calls.resume()
        self._capture.__enter__()  # type: ignore[no-untyped-call]
        self._paused = False

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._paused:
            self.resume()
        capture, self._capture = self._capture, None
        assert capture is not None
        capture.__exit__(kind, value, tb)  # type: ignore[no-untyped-call]
        self._compilation.__exit__(kind, value, tb)
        self._calls.end()
        self._regions.end()
        unfinished = bool(capture.tape.uses or self._begun)
        capture.tape.close()
        self._begun = None
        problems = capture.tape.problems + self._buffer_problems(capture, Inventory.of(self.model))
        if kind is not None:
            return
        if problems:
            self.zero_grad()
            refuse(problems)
        if unfinished:
            warnings.warn("left `with clipper` without clipper.backward(losses): nothing was learned", stacklevel=2)

    def backward(self, losses: Tensor, *, example_mask: Tensor | None = None, more: bool = False) -> ClipResult:
        """Clip and add to ``p.grad`` (created if None).

        Each example of a batch is to be in one call only: several losses of one row are added up before, since every
        call clips to C by itself.

        losses: ``[B*K]``, one per row, not reduced, not scaled.
        example_mask: ``[B]`` of bool; False marks padding, which contributes exactly 0.
        more: the losses ``[k]`` are of some rows of one example, whose other rows follow in the same block. Nothing is
            clipped or written before the last of them, whose call says ``more=False``; the result is empty until then.

        Raises ``CaptureError``, listing every problem at once, before any ``p.grad`` is written.
        """
        capture = self._capture
        if capture is None or self._paused:
            raise CaptureError("clipper.backward was called outside `with clipper`: compute the losses inside, too")
        tape = capture.tape
        try:
            with torch._C.DisableTorchFunction(), without_autocast():
                model = Inventory.of(self.model)
                examples = self._examples(losses, example_mask, more=more)
                refuse(tape.problems + tape.changed_after_use() + self._state_problems(capture, model))
                if examples and not losses.requires_grad:
                    raise CaptureError(
                        "losses depend on no trainable parameter: compute them inside `with clipper`, with gradients"
                        f" enabled{_without_grad(tape.used_without_grad)}"
                    )
                if self._begun is None:
                    self._see_inputs(model.trainable)
                self._see_examples(examples)
                with self._pace.spending(repeated=self._calls.repeats):
                    unseen = self._calls.show(len(losses)) if examples else ""
                clipped = self._clip(losses, examples, example_mask, model.trainable, more=more)
                refuse(self._state_problems(capture, model.again()))  # hooks can do what they like
                unused = [name for name in model.trainable if name not in clipped.sums]
                self._buffers = self._fixed
                self._regions.accept()
                if not more:
                    self._write(clipped.sums, model.trainable)
                    self._clipped = [(weakref.ref(t), t._version) for t in self._calls.inputs if t.ndim]
        finally:
            capture.restart()
            self._calls.restart()
            self._regions.restart()
            self._parameters = None
        if examples and not more:
            self._warn(unused, tape, unseen=unseen)
        return ClipResult(clipped.norms, clipped.factors)

    def _clip(
        self,
        losses: Tensor,
        examples: int,
        mask: Tensor | None,
        parameters: Mapping[str, nn.Parameter],
        *,
        more: bool,
    ) -> Clipped:
        assert self._capture is not None
        none = losses.detach().new_zeros(0, dtype=torch.float64)
        if examples == 0:
            return Clipped(none, none, sums={})
        begun, self._begun = self._begun, None
        if more and begun is None:
            begun = Begun({}, 0, torch.ones(1, dtype=torch.bool, device=losses.device))
        finite = losses.detach().isfinite().view(examples, -1).all(1)
        finite = finite if begun is None else finite & begun.finite
        this = Pass(
            capture=self._capture,
            parameters=parameters,
            ownership=self._ownership,
            forms=self._forms,
            losses=losses,
            examples=examples,
            augmult=self.augmult,
            rule=self._rule,
            path=self._calls.path(),
            mask=finite if mask is None else finite & mask,
            begun=begun,
            pace=self._pace,
        )
        if not more:
            return this.run()
        self._begun = this.go_on()
        return Clipped(none, none, sums={})

    def _examples(self, losses: Tensor, mask: Tensor | None, *, more: bool) -> int:
        """B."""
        begun = self._begun.rows if self._begun is not None else 0
        if more or begun:
            return check_part(losses, mask, self.augmult, begun, more=more)
        examples = check_losses(losses, mask, self.augmult, self._calls.inputs)
        if examples != 1 and self._capture is not None and not self._capture.detach:
            raise CaptureError(
                "the form 'example' took the model's input for one example, but there are losses of more: give the"
                " model all rows of the losses at once"
            )
        return examples

    # What must hold before and after

    def _see_parameters(self, model: Inventory | None = None) -> None:
        """At the first use of a step: a step after another in the same block begins with what the optimizer left."""
        if self._parameters is not None:
            return
        with torch._C.DisableTorchFunction():
            self._parameters = seen((model or Inventory.of(self.model)).trainable)
        if self._parameters != self._last:
            if self._last:
                self._pace.changed("parameters")
            self._last = self._parameters
        if self._pace.take():
            self._forget_shown()

    def _see_fixed(self, now: Seen) -> None:
        """Buffers and frozen parameters that have changed between blocks, likewise."""
        if changed(self._fixed, now):
            self._pace.changed("buffers and frozen parameters")

    def _see_inputs(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Whether they are those of the last call in the block, whose sum is still there."""
        inputs = [t for t in self._calls.inputs if t.ndim]
        same = [(id(of()), version) for of, version in self._clipped] == [(id(t), t._version) for t in inputs]
        if inputs and same and any(p.grad is not None and bool(p.grad.any()) for p in parameters.values()):
            self._warn_once(
                "twice",
                "the very tensors of the last clipper.backward in this block went into the model again. If these are"
                " the same examples, each call clips them to max_grad_norm by itself, which the privacy accounting does"
                " not know: add up all losses of a row, and call it once",
            )

    def _see_examples(self, examples: int) -> None:
        """More examples than ever: there are pairs of places that no probe has seen."""
        if examples > self._most_examples:
            self._most_examples = examples
            self._pace.begin()
            self._forget_shown(wholly=True)

    def _forget_shown(self, *, wholly: bool = False) -> None:
        self._ownership.forget(wholly=wholly)
        self._calls.forget(wholly=wholly)

    def _buffer_problems(self, capture: Capture, model: Inventory) -> list[Problem]:
        """Buffers and frozen parameters that a step has changed, unless from constants; buffers are put back."""
        unfrozen = {name: p for name, p in model.trainable.items() if name not in capture.parameters}
        fixed = {name: t for name, t in {**model.fixed, **unfrozen}.items() if name not in capture.parameters}
        self._fixed = seen(fixed)
        moved = [
            name
            for name in changed(self._buffers, self._fixed)
            if name not in fixed or not capture.excuses(name, fixed[name], replaced=self._replaced(name, fixed[name]))
        ]
        with torch.no_grad():
            for name in self._copies.keys() & set(moved):
                module, _, own_name = name.rpartition(".")
                self.model.get_submodule(module)._buffers[own_name] = self._kept[name]
                self._kept[name].copy_(self._copies[name])
                self._fixed[name] = self._buffers[name]
        what = "changed during a private step: a buffer would carry private data"
        cure = "freeze it (eval mode, no running statistics), or update it from public data outside `with clipper`"
        said = {name.rpartition(".")[0] for problem in capture.tape.problems for name in problem.names}
        return [Problem((name,), what, cure) for name in moved if name.rpartition(".")[0] not in said]

    def _replaced(self, name: str, now: Tensor) -> bool:
        """Whether another tensor stands in a buffer's place (a cache that grew)."""
        return name not in self._buffers or self._buffers[name][0] != id(now)

    def _state_problems(self, capture: Capture, model: Inventory) -> list[Problem]:
        problems = self._buffer_problems(capture, model)
        moved = [] if self._parameters is None else changed(self._parameters, seen(model.trainable))
        moved += sorted(set(capture.parameters).symmetric_difference(model.trainable).difference(moved))
        if moved:
            what = "changed between the forward pass and clipper.backward, or frozen or unfrozen inside the block"
            problems.append(Problem((listed(moved),), what, "leave the block for that"))
        foreign = self._foreign_gradients(model.trainable)
        if foreign:
            what = "p.grad holds what this clipper did not write"
            cure = "call clipper.zero_grad() first, and let no other backward pass reach these parameters"
            problems.append(Problem((listed(foreign),), what, cure))
        return problems

    def _write(self, sums: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the sums of one complete backward pass to ``p.grad``: all of them, or none."""
        with torch.no_grad():
            ready = {name: sums.pop(name).to(p.dtype).contiguous() for name, p in parameters.items() if name in sums}
            missing = [p for name, p in parameters.items() if p.grad is None and name not in ready]
            zeros = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in missing]
            # From here on nothing large is made: memory that ran out half way would leave half a sum.
            self.writes += 1
            for p, zero in zip(missing, zeros, strict=True):
                p.grad = zero
            for name, total in ready.items():
                p = parameters[name]
                if p.grad is None:
                    p.grad = total
                else:
                    p.grad += total
        now = seen({name: _grad(p) for name, p in parameters.items()})
        self._written = {id(p): (_grad(p), now[name][1]) for name, p in parameters.items()}

    def _warn(self, unused: Iterable[str], tape: Tape, *, unseen: str) -> None:
        """Each thing once."""
        for function, names in tape.fallbacks.items():
            self._warn_once(
                function,
                f"dpfast has no rule for {function} with {listed(dict.fromkeys(names))}: its per-example gradients come"
                " from a vmapped vector-Jacobian product, which is correct and slow",
            )
        unused = [name for name in unused if name not in self._warned]
        if unused:
            self._warned.update(unused)
            self._warn_once(
                "unused " + unused[0],
                f"no loss depends on {listed(unused)}: noise is added all the same; freeze what stays"
                + _without_grad(tape.used_without_grad.intersection(unused)),
            )
        if len(self._ownership.dims) > MANY_PATHS:
            self._warn_once(
                "paths",
                f"the model has taken more than {MANY_PATHS} different paths (layers left out at random?): each new one"
                " costs some backward passes, which show that it keeps examples apart",
            )
        if tape.read_out:
            self._warn_once(
                "read out",
                f"the model reads numbers out of the batch ({listed(sorted(tape.read_out))}): what it does with them"
                " may depend on all examples at once, which no probe can show. Use torch.where, or decide outside of"
                " the model from what is public",
            )
        self._reshown += tape.reshown
        if self._reshown > FEW_STEPS:
            by = f" (by {listed(sorted(tape.picked_by))})" if tape.picked_by else ""  # compiled steps do not say
            self._warn_once(
                "reshown",
                f"data picks rows inside the block{by}: that they stay with their"
                " examples is shown in every step, which costs up to 2 log2(B) + 1 more backward passes. Look things up"
                " before the block, or in a registered buffer or a tensor that stays the same",
            )
        for reason in sorted(tape.eager):
            self._warn_once(
                f"eager {reason}", f"a part of the compiled model runs eagerly inside `with clipper`, because {reason}"
            )
        if unseen:
            self._warn_once(
                "forward probe",
                f"it was not shown that the model takes no statistics over the batch behind a detach(): {unseen}",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _without_grad(names: Collection[str]) -> str:
    if not names:
        return ""
    return (
        f" ({listed(sorted(names))} ran under torch.no_grad(), as reentrant activation checkpointing does: use"
        " use_reentrant=False)"
    )


def _shard_problems(model: Inventory) -> list[Problem]:
    """Of parameters that are not here in full."""
    tensor = sys.modules.get("torch.distributed.tensor")
    cut = [] if tensor is None else [name for name, p in model.trainable.items() if isinstance(p, tensor.DTensor)]
    what, cure = "lies in shards", "enter `with dpfast.ranks.gathered(model)` first, once for each logical batch"
    return [Problem((listed(cut),), what, cure)] if cut else []


def _uses_gradients(p: nn.Parameter) -> bool:
    """Whether a hook waits for autograd's gradient, other than to refuse it."""
    hooks = p._post_accumulate_grad_hooks or {}
    return not all(getattr(hook, "refuses", False) for hook in hooks.values())


def _model_problems(model: Inventory) -> list[Problem]:
    parameters, every = model.trainable, {**model.trainable, **model.frozen}
    lazy = [name for name, p in every.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        what = "a lazy layer that has no shape yet"
        return [Problem((listed(lazy),), what, "run the model once on public or random input first")]
    problems = []
    complex_ones = [name for name, p in parameters.items() if p.is_complex()]
    if complex_ones:
        what, cure = "complex parameters", "keep real and imaginary parts (torch.view_as_real), or freeze them"
        problems.append(Problem((listed(complex_ones),), what, cure))
    half = [name for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        what = (
            "half-precision parameters: the sum of clipped gradients would be rounded after its sensitivity was bounded"
        )
        cure = "keep float32 parameters and compute in bfloat16 under torch.autocast"
        problems.append(Problem((listed(half),), what, cure))
    hooked = [name for name, p in parameters.items() if p._backward_hooks or _uses_gradients(p)]
    if hooked:
        what = "a hook on its gradient would see, or use, what is not clipped"
        problems.append(Problem((listed(hooked),), what, "remove the hook: the update is DPOptimizer's"))
    return problems
