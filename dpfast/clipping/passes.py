"""The two ways through a private backward pass: a batch of examples, or one example alone."""

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping.accumulate import Accumulation, Clipped
from dpfast.clipping.capture import Capture
from dpfast.clipping.forms import Forms
from dpfast.clipping.ownership import (
    Ownership,
    Showing,
    Signature,
    Sketch,
    Sketches,
    is_fleeting,
    likely_dim,
    possible_dims,
)
from dpfast.clipping.private import repeatable_backward
from dpfast.clipping.problems import Problem, refuse
from dpfast.clipping.rows import Rows
from dpfast.clipping.rule import ClipRule
from dpfast.clipping.tape import Receive, Site, TapedUse, plain
from dpfast.errors import CaptureError
from dpfast.pace import Pace


@dataclass(frozen=True)
class Begun:
    """What earlier passes have seen of one example: its gradients ``[1, *shape]`` by name, the number of its rows, and
    whether all their losses were finite ``[1]``.
    """

    grads: dict[str, Tensor]
    rows: int
    finite: Tensor


@dataclass(frozen=True)
class Pass:
    """Everything a backward pass over ``losses [B*K]`` needs.

    begun: None unless the losses are of some rows of one example (``[k]``), which several passes share.
    """

    capture: Capture
    parameters: Mapping[str, nn.Parameter]
    ownership: Ownership
    forms: Forms
    losses: Tensor
    examples: int
    augmult: int
    rule: ClipRule
    path: Hashable  # what the step ran: the functions called, the modes of the layers
    mask: Tensor  # False for examples that contribute nothing: padding, and those whose loss is not finite
    begun: Begun | None = None
    pace: Pace = field(default_factory=Pace)  # of the passes that show rows

    def run(self) -> Clipped:
        """Norms, factors and clipped sums; raises ``CaptureError`` with all problems, writes nothing."""
        accumulation = self._accumulate()
        with plain():
            return accumulation.finish(self.rule, self.mask)

    def go_on(self) -> Begun:
        """What has been seen of the example, with this pass, when more are to come."""
        assert self.begun is not None
        accumulation = self._accumulate()
        with plain():
            return Begun(accumulation.summed(), self.begun.rows + len(self.losses), self.mask)

    def _accumulate(self) -> Accumulation:
        return self._all_at_once() if self.capture.detach else self._one_example()

    def _all_at_once(self) -> Accumulation:
        """Uses whose rows are known give their terms at once. Of the others a sketch is kept, which shows their rows in
        passes over some of the examples; a last pass over all gives their terms.
        """
        tape = self.capture.tape
        signature = self._signature()
        known = {} if self._picked_among_rows else self.ownership.known(signature)
        unknown = tape.uses.keys() - known.keys() if self.examples > 1 else set()
        pending = reachable(self.losses, unknown) if unknown else unknown
        showing = Showing(self.ownership, signature, self.examples)
        accumulation = self._accumulation(signature)
        reached: set[Site] = set()

        def receive(use: TapedUse, saved: tuple[Tensor, ...], g: Tensor) -> Tensor | None:
            again = use.site in reached
            reached.add(use.site)
            if again or use.site not in tape.uses or (use.site in unknown and use.site not in pending):
                tape.problems.append(_unseen(use))
            elif use.site in pending and bool((g != 0).any()):
                showing.begin(use, g)
            else:
                return accumulation.add(use, saved, g, self._rows(use, g, known.get(use.site)))
            return None

        self._backward_unleaked(receive, retain_graph=bool(pending))
        if not reached:
            raise CaptureError(
                "the losses depend on no trainable parameter used since the last clipper.backward: compute them inside"
                " `with clipper`, one forward pass before each clipper.backward"
            )
        if showing.evidence:
            with self.pace.spending(repeated=self.ownership.repeats(signature)):
                self._show(showing, accumulation)
        return accumulation

    def _show(self, showing: Showing, accumulation: Accumulation) -> None:
        """Show the rows of uses by passes over groups of examples, and add their terms."""
        fleeting: set[Site] = set()
        steady: set[Site] = set()

        def receive(use: TapedUse, saved: tuple[Tensor, ...], g: Tensor) -> Tensor | None:
            before = showing.evidence.get(use.site)
            if before is None or use.site in steady:
                return None
            showing.weigh(use, g, range(self.examples))
            evidence = showing.evidence[use.site]
            if before.dims and not evidence.dims:  # other than in the first pass, whose losses were the same
                showing.evidence[use.site] = before
                return None
            steady.add(use.site)
            if self._picked_among_rows or is_fleeting(use, g, evidence.dims, self.examples, len(self.losses)):
                fleeting.add(use.site)
            if not evidence.dims:
                return None
            dim = likely_dim(evidence, g, self.examples)
            return accumulation.add(use, saved, g, self._rows(use, g, dim))

        for group in self.ownership.groups(showing.signature, self.examples):
            self._backward(group, showing.weighing(group), retain_graph=True)
        self._backward_unleaked(receive, retain_graph=False)
        uses = self.capture.tape.uses
        self.capture.tape.reshown = self._picked_among_rows or any(uses[site].selected for site in showing.evidence)
        unsteady = [_unsteady(uses[site]) for site in showing.evidence if site not in steady]
        mixed = self.ownership.settle(showing.signature, showing.evidence, self.examples, fleeting)
        refuse(unsteady + [_mixes(uses[site]) for site in mixed])

    @property
    def _picked_among_rows(self) -> bool:
        """Whether data picked along a dimension that only seemed to lie beside the rows: the batch has another size."""
        return bool(self.capture.tape.picked_beside - {len(self.losses)})

    def _backward_unleaked(self, receive: Receive, *, retain_graph: bool) -> None:
        """Back-propagate all losses; refused if autograd itself gives a parameter a gradient."""
        leaked = self._backward(None, receive, retain_graph=retain_graph)
        refuse(self.capture.tape.problems + [_leak(name) for name, grad in leaked.items() if grad is not None])

    def accumulate_unshown(self, *, showing: bool = False) -> Accumulation:
        """For a plan, whose tensors hold no numbers: rows are where they can be.

        showing: with the memory of a step that shows where they are.
        """
        if not self.capture.detach:
            return self._one_example()
        accumulation = self._accumulation(0)
        sketches, kept = Sketches(self.examples, planned=True), list[Sketch]()

        def sketch(use: TapedUse, _saved: tuple[Tensor, ...], g: Tensor) -> None:
            kept.append(sketches.of(g, possible_dims(use, g, self.examples)))

        def receive(use: TapedUse, saved: tuple[Tensor, ...], g: Tensor) -> Tensor | None:
            if showing:
                sketches.of(g, possible_dims(use, g, self.examples))
            return accumulation.add(use, saved, g, self._rows(use, g, None))

        if showing:
            self._backward(None, sketch, retain_graph=True)
        self._backward(None, receive, retain_graph=False)
        return accumulation

    def _signature(self) -> Signature:
        """Of this step, whatever the number of its rows: sizes that the rows divide count in rows."""
        n = len(self.losses)
        uses = [
            (site, tuple((size // n, "rows") if size and size % n == 0 else (size, "") for size in shape))
            for site, shape in self.capture.tape.shapes.items()
        ]
        return hash((self.path, tuple(uses)))

    def _one_example(self) -> Accumulation:
        """The batch is one example: its gradient is the ordinary one, and no rows can mix."""
        assert self.examples == 1
        grads = self._backward(None, lambda *_: None, retain_graph=False)
        refuse(self.capture.tape.problems)
        accumulation = self._accumulation(0)
        with plain():
            for name, grad in grads.items():
                if grad is not None:
                    accumulation.add_whole(name, grad.unsqueeze(0))
        return accumulation

    def _accumulation(self, signature: Signature) -> Accumulation:
        return Accumulation(
            self.parameters,
            self.capture.tracked,
            self.capture.tape,
            self.examples,
            self.forms,
            signature,
            self.losses.device,
            None if self.begun is None else self.begun.grads,
        )

    def _backward(
        self, group: Sequence[int] | None, receive: Receive, *, retain_graph: bool
    ) -> dict[str, Tensor | None]:
        """Back-propagate all losses, or those of a group of examples; what autograd itself gives each parameter.

        Meanwhile every ``p.grad`` is set aside, so that whatever reaches one (a path that was not captured, a backward
        pass inside the backward pass) is seen and never added to what the clipper has written. The capture stays on:
        activation checkpointing runs parts of the forward pass again.
        """
        cotangent = torch.full_like(self.losses, 1 / self.augmult)
        if group is not None:
            kept = torch.zeros(self.examples, dtype=torch.bool)
            kept[list(group)] = True
            cotangent *= kept.to(cotangent.device).repeat_interleave(self.augmult)
        parameters = list(self.parameters.values())
        set_aside = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            again = repeatable_backward() if retain_graph else nullcontext()
            with torch._C._EnableTorchFunction(), self.capture.tape.receiving(receive), again:
                # torch.autograd.backward, less its own torch-function dispatch: that would leave the capture
                grads = torch.autograd.Variable._execution_engine.run_backward(
                    (self.losses,),
                    (cotangent,),
                    retain_graph,
                    False,  # create_graph
                    (self.capture.tape.anchor, *parameters),
                    allow_unreachable=True,
                    accumulate_grad=False,
                )
            return {
                name: p.grad if grad is None else grad
                for (name, p), grad in zip(self.parameters.items(), grads[1:], strict=True)
            }
        finally:
            for p, grad in zip(parameters, set_aside, strict=True):
                p.grad = grad

    def _rows(self, use: TapedUse, g: Tensor, dim: int | None) -> Rows:
        """``dim`` None: nothing is known, because the gradient is zero, of one example, or not finite."""
        possible = possible_dims(use, g, self.examples)
        if dim is None:
            dim = possible[0] if possible else 0
        if self.examples > 1 and dim not in possible:
            what = f"{use.site.function}: the output cannot be cut into examples along dimension {dim}"
            cure = "keep the rows of the batch together along one dimension"
            refuse([_picked_unevenly(use) if use.selected else Problem(use.site.names, what, cure)])
        return Rows(self.examples, dim)


def _unseen(use: TapedUse) -> Problem:
    return Problem(
        use.site.names,
        f"{use.site.function}: reached by a backward pass inside the backward pass (a hook, an autograd.Function,"
        " reentrant checkpointing), so nothing is known of its rows",
        "checkpoint activations with use_reentrant=False; write implicit layers and custom gradients with operations"
        " that autograd differentiates",
    )


def _mixes(use: TapedUse) -> Problem:
    if use.selected:
        return _picked_unevenly(use)
    return Problem(
        use.site.names,
        f"{use.site.function}: the gradient of one example's loss reaches rows of other examples (or the result has no"
        " dimension that holds the rows)",
        "keep examples apart along one dimension, the rows of each next to each other (the parts of an example as"
        " [B, parts, ...], flattened inside the model): no statistics, attention or means over the batch, in the"
        " model or in the losses; call the model once, on all rows; register constant tensors as buffers",
    )


def _picked_unevenly(use: TapedUse) -> Problem:
    return Problem(
        use.site.names,
        f"{use.site.function}: data has picked its rows, not as many of every example or not next to each other (or"
        " examples meet in them)",
        "give it all rows and choose among the results (torch.where, or a product with the gate): how many rows an"
        " expert gets differs from step to step",
    )


def _unsteady(use: TapedUse) -> Problem:
    return Problem(
        use.site.names,
        f"{use.site.function}: two backward passes over the same losses gave it different gradients, or one none",
        "write custom gradients so that they may be asked for several times, and always give the same",
    )


def reachable(losses: Tensor, sites: AbstractSet[Site]) -> AbstractSet[Site]:
    """Those of ``sites`` that a backward pass from ``losses`` may come by.

    All of them where a view was changed in place: autograd does not tell what lies behind that (``CopySlices``).
    """
    found: set[Site] = set()
    visited: set[Any] = set()
    waiting: list[Any] = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        if "CopySlices" in node.name():
            return sites
        visited.add(node)
        if isinstance(uses := getattr(node, "uses", None), tuple):
            found.update(use.site for use in uses if isinstance(use, TapedUse))
        waiting.extend(following for following, _ in node.next_functions)
    return found & sites


def _leak(name: str) -> Problem:
    return Problem(
        (name,),
        "the losses depend on it along a path that was not captured",
        "run the whole forward pass inside `with clipper`, outside scripted functions and autograd.Function.apply"
        " (which hide the parameter), on inputs that are made before it or go into the model (torch.tensor(...) inside"
        " makes constants), and checkpoint activations with use_reentrant=False",
    )
