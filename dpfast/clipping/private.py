"""Private graphs: what ``torch.compile`` has traced, rewritten for a private step and compiled with its backward pass.

Parameters enter a private graph detached, so that it computes no weight gradients. Behind each use stands a ``Tap``,
which hands out the output's gradient and what the use's rule saved as the gradients of *probes*: inputs that nothing is
computed from. So the graph is a pure function, which any compiler takes, and ``Probes``, the eager node in front of it,
tells the tape what the taps of eager uses would have told it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dpfast.clipping.capture import Capture
from dpfast.clipping.rules.table import RULES
from dpfast.clipping.tape import IsTracked, Tape, TapedUse, Use
from dpfast.clipping.trees import function_name

COMPILER = "inductor"  # a name that torch.compile(backend=...) knows


@dataclass(frozen=True)
class Like:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Self:
        return cls(t.shape, t.dtype, t.device)

    def probe(self) -> Tensor:
        """A tensor of this shape without memory of its own; floating, as gradients are."""
        dtype = self.dtype if self.dtype.is_floating_point else torch.float64
        return torch.zeros((), dtype=dtype, device=self.device).expand(self.shape)

    def stand_in(self) -> Tensor:
        """For rules, which look at shapes."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Kind:
    """What the capture takes a tensor for: constant (certainly or not), drawn, or data (perhaps selected)."""

    constant: bool | None
    drawn: bool
    selected: bool

    @classmethod
    def of(cls, t: Tensor, capture: Capture) -> Self:
        return cls(capture.constants.get(t, None), t in capture.drawn, t in capture.selected)

    def give(self, t: Tensor, capture: Capture) -> None:
        """``t`` is of this kind."""
        if self.constant is not None:
            capture.constants[t] = self.constant
        elif self.drawn:
            capture.drawn[t] = True
        if self.selected:
            capture.selected[t] = True


@dataclass(frozen=True)
class Recorded:
    """A use in a graph: the call, with nodes in the place of tensors, and what its tap hands out."""

    func: Any
    args: Any
    kwargs: Any
    inputs: Mapping[fx.Node, Like]
    targets: tuple[fx.Node, ...]
    output: Like
    saved: tuple[Like, ...]
    selected: bool

    def taped(self, capture: Capture, known: Mapping[fx.Node, Any]) -> TapedUse:
        """The use, as the tape takes note of it now; its rule need not know the numbers of what is not ``known``."""
        values = {node: known[node] if node in known else like.stand_in() for node, like in self.inputs.items()}
        args, kwargs = map_arg((self.args, self.kwargs), lambda node: values[node])
        use = _ruled(self.func, capture.tracked, args, kwargs)
        targets = capture.with_bases([known[node] for node in self.targets])
        site = capture.tape.site(function_name(self.func), capture.names_of(targets))
        taped = TapedUse(site, use.terms, use.row_dims, self.selected)
        capture.tape.note(taped, self.output.shape, targets)
        return taped


def _ruled(func: Any, is_tracked: IsTracked, args: Any, kwargs: Any) -> Use:
    use = RULES[func](is_tracked, *args, **kwargs)
    assert isinstance(use, Use)
    return use


@dataclass
class Plan:
    """How to run a graph with inputs of certain kinds.

    uses: by node, in order. before: nodes that uses need, computed from parameters and constants alone; they run
    eagerly, seen by the capture, and those that uses read enter the private graph. outputs: what the capture takes
    each tensor among the results for. unfit: why there can be no private graph, in words.
    """

    uses: dict[fx.Node, Recorded]
    before: list[fx.Node]
    outputs: list[Kind]
    unfit: str
    private: Callable[..., Any] | None = None

    @property
    def entering(self) -> list[fx.Node]:
        """Those of ``before`` that uses read."""
        return [node for node in self.before if any(node in use.inputs for use in self.uses.values())]

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any], given: Sequence[Tensor]) -> None:
        """Make the private graph of ``graph`` for tensors like ``given``, with its backward pass."""
        if self.private is not None:
            return
        asked = [like.probe().requires_grad_() for use in self.uses.values() for like in (use.output, *use.saved)]
        compiler = torch._dynamo.lookup_backend(COMPILER)
        on_cpu = all(t.device.type == "cpu" for t in given)
        # A backward pass that is compiled when it first runs would be compiled under the capture.
        with (
            repeatable_backward(),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            right_layouts() if on_cpu else nullcontext(),
        ):
            try:
                self.private = compiler(private_graph(graph, self, inputs), [*given, *asked])
            except Exception as error:
                self.unfit = f"it could not be compiled ({type(error).__name__})"


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    """The inputs of ``graph``, in order."""
    return list(graph.graph.find_nodes(op="placeholder"))


def private_graph(graph: fx.GraphModule, plan: Plan, inputs: Sequence[Any]) -> fx.GraphModule:
    """Of the tensors among ``inputs``, what enters of ``plan.before``, and the probes; numbers become constants."""
    private, parts = fx.Graph(), dict[str, Any]()
    new: dict[fx.Node, Any] = {}
    for node, value in zip(placeholders(graph), inputs, strict=True):
        new[node] = private.placeholder(node.name) if isinstance(value, Tensor) else value
    for node in plan.entering:
        new[node] = private.placeholder(node.name)
    asked = {
        node: tuple(private.placeholder(f"probe_{node.name}_{i}") for i in range(1 + len(use.saved)))
        for node, use in plan.uses.items()
    }
    for node in graph.graph.nodes:
        if node in new:
            continue
        if node in plan.uses:
            use, name = plan.uses[node], f"use_{node.name}"
            parts[name] = Captured(use.func)
            call = map_arg((use.args, use.kwargs, use.targets), lambda n: new[n])
            new[node] = private.call_module(name, (*call, asked[node]))
            continue
        if node.op in ("get_attr", "call_module"):
            parts[node.target] = reduce(getattr, node.target.split("."), graph)
        new[node] = private.node_copy(node, lambda n: new[n])
        new[node].meta = {}  # shapes that torch.compile may have left open
    return fx.GraphModule(parts, private)


@dataclass(frozen=True)
class Among:
    """Whether something is one of the trainable tensors of a call."""

    targets: Sequence[Tensor]

    def __call__(self, value: Any) -> bool:
        return any(value is t for t in self.targets)

    def base(self, t: Tensor) -> Tensor:
        """The tensor itself: what it was expanded from enters its terms, and no terms are made in a graph."""
        return t


class Captured(nn.Module):
    """Stands in a private graph for the call of a use."""

    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func = func

    def forward(self, args: Any, kwargs: Any, targets: Any, probes: Any) -> Tensor:
        """targets: the trainable tensors among the arguments, detached."""
        use = _ruled(self.func, Among(targets), args, kwargs)
        tapped: Tensor = Tap.apply(self.func(*args, **kwargs), len(use.saved), *use.saved, *probes)  # type: ignore[no-untyped-call]
        return tapped


class Tap(torch.autograd.Function):
    """A copy (compilers leave it out) whose backward gives the probes the output's gradient and the saved tensors."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, count: int, *saved_and_probes: Tensor) -> Tensor:
        ctx.save_for_backward(*saved_and_probes[:count])
        return output.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = [t if t.is_floating_point() else t.double() for t in ctx.saved_tensors]
        return (g, None, *[None] * len(saved), g, *saved)


class Probes(torch.autograd.Function):
    """The probes of a private graph; their gradients go to the tape."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, tape: Tape, uses: tuple[TapedUse, ...], recorded: Sequence[Recorded]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.uses, ctx.recorded = tape, uses, recorded
        return tuple(like.probe() for r in recorded for like in (r.output, *r.saved))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        given = iter(grads)
        for use, recorded in zip(ctx.uses, ctx.recorded, strict=True):
            g, saved = next(given), [(next(given), like.dtype) for like in recorded.saved]
            if g is not None:
                ctx.tape.record(use, tuple(t.to(dtype) for t, dtype in saved if t is not None), g)
        return None, None, None, None


def probes(plan: Plan, capture: Capture, known: Mapping[fx.Node, Any]) -> tuple[Tensor, ...]:
    """For one run of a private graph, of whose uses the tape takes note."""
    recorded = tuple(plan.uses.values())
    if not recorded:
        return ()
    uses = tuple(use.taped(capture, known) for use in recorded)
    given: tuple[Tensor, ...] = Probes.apply(capture.tape.anchor, capture.tape, uses, recorded)  # type: ignore[no-untyped-call]
    return given


@contextmanager
def right_layouts() -> Iterator[None]:
    """Inside, inductor leaves memory formats alone.

    With its layout optimization, torch 2.13 on the CPU gives a gradient of 0 to most of a UNet2DModel, private or not
    (two DownBlock2D of 32 and 64 channels at 16x16 are enough).
    """
    import torch._inductor.config

    with torch._inductor.config.patch(layout_optimization=False):
        yield


@contextmanager
def repeatable_backward() -> Iterator[None]:
    """Inside, backward passes are compiled, and run, so that they may run again: they keep what they read."""
    config = sys.modules.get("torch._functorch.config")
    with config.patch(donated_buffer=False) if config is not None else nullcontext():
        yield
