"""Private graphs: what ``torch.compile`` has traced, rewritten for a private step and compiled with its backward pass.

Parameters enter a private graph detached, so that it computes no weight gradients. Behind each use stands a ``Tap``,
whose backward pass calls ``dpfast::hand_over``, an op that compilers leave as it is, with the output's gradient and
what the use's rule saved: it tells the tape what the tap of an eager use would have told it, as soon as that is known.
That is only lent: a compiler may write over what nothing in the graph reads any more. Which tape it is the graph cannot
know, as it is compiled once and runs often; that comes in as a number, the *key*.
"""

import itertools
import sys
import weakref
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
    """A use in a graph: the call, with nodes in the place of tensors."""

    func: Any
    args: Any
    kwargs: Any
    inputs: Mapping[fx.Node, Like]
    targets: tuple[fx.Node, ...]
    output: torch.Size
    selected: bool

    def taped(self, capture: Capture, known: Mapping[fx.Node, Any]) -> TapedUse:
        """The use, as the tape takes note of it now; its rule need not know the numbers of what is not ``known``."""
        values = {node: known[node] if node in known else like.stand_in() for node, like in self.inputs.items()}
        args, kwargs = map_arg((self.args, self.kwargs), lambda node: values[node])
        use = _ruled(self.func, capture.tracked, args, kwargs)
        targets = capture.with_bases([known[node] for node in self.targets])
        site = capture.tape.site(function_name(self.func), capture.names_of(targets))
        taped = TapedUse(site, use.terms, use.row_dims, selected=self.selected, lent=True)
        capture.tape.note(taped, self.output, targets)
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
    each tensor among the results for. picked_beside: as on the tape, with this batch. unfit: why there can be none.
    """

    uses: dict[fx.Node, Recorded]
    before: list[fx.Node]
    outputs: list[Kind]
    picked_beside: frozenset[int]
    batch: tuple[int, int]
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
        key = torch.zeros((), dtype=torch.float64, requires_grad=True)
        compiler = torch._dynamo.lookup_backend(COMPILER)
        on_cpu = all(t.device.type == "cpu" for t in given)
        # A backward pass that is compiled when it first runs would be compiled under the capture.
        with (
            repeatable_backward(),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            right_layouts() if on_cpu else nullcontext(),
        ):
            try:
                self.private = compiler(private_graph(graph, self, inputs), [*given, key])
            except Exception as error:
                self.unfit = f"it could not be compiled ({type(error).__name__})"


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    """The inputs of ``graph``, in order."""
    return list(graph.graph.find_nodes(op="placeholder"))


def private_graph(graph: fx.GraphModule, plan: Plan, inputs: Sequence[Any]) -> fx.GraphModule:
    """Of the tensors among ``inputs``, what enters of ``plan.before``, and the key; numbers become constants."""
    private, parts = fx.Graph(), dict[str, Any]()
    new: dict[fx.Node, Any] = {}
    for node, value in zip(placeholders(graph), inputs, strict=True):
        new[node] = private.placeholder(node.name) if isinstance(value, Tensor) else value
    for node in plan.entering:
        new[node] = private.placeholder(node.name)
    key, places = private.placeholder("key"), {node: i for i, node in enumerate(plan.uses)}
    for node in graph.graph.nodes:
        if node in new:
            continue
        if node in plan.uses:
            use, name = plan.uses[node], f"use_{node.name}"
            parts[name] = Captured(use.func)
            call = map_arg((use.args, use.kwargs, use.targets), lambda n: new[n])
            new[node] = private.call_module(name, (*call, key, places[node]))
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

    def forward(self, args: Any, kwargs: Any, targets: Any, key: Tensor, place: int) -> Tensor:
        """targets: the trainable tensors among the arguments, detached. place: of the use in the plan."""
        use = _ruled(self.func, Among(targets), args, kwargs)
        tapped: Tensor = Tap.apply(self.func(*args, **kwargs), key, place, *use.saved)  # type: ignore[no-untyped-call]
        return tapped


class Tap(torch.autograd.Function):
    """A copy (compilers leave it out) whose backward hands over the output's gradient and the saved tensors."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, key: Tensor, place: int, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(key, *saved)
        ctx.place = place
        return output.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        key, *saved = ctx.saved_tensors
        # What it gives back is the gradient of the key, so that no compiler takes the call for idle.
        return g, torch.ops.dpfast.hand_over(key, ctx.place, g, saved), None, *[None] * len(saved)


@dataclass(frozen=True)
class Run:
    """One run of a private graph in the forward pass: its uses, in the plan's order, and the tape that is told."""

    tape: Tape
    uses: tuple[TapedUse, ...]


_RUNS: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()  # by their keys; held by their Keys
_KEYS = itertools.count()


def _hand_over(key: Tensor, place: int, g: Tensor, saved: list[Tensor]) -> Tensor:
    run = _RUNS[int(key)]
    run.tape.record(run.uses[place], tuple(saved), g)
    return torch.zeros_like(key)


_OPS = torch.library.Library("dpfast", "FRAGMENT")
_OPS.define("hand_over(Tensor key, int place, Tensor g, Tensor[] saved) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_OPS.impl("hand_over", _hand_over, "CompositeExplicitAutograd")
torch.library.register_fake("dpfast::hand_over", lambda key, *_: torch.empty_like(key), lib=_OPS)


class Key(torch.autograd.Function):
    """The key of a run, a number on the CPU: the node in front of a private graph, by which it is reached."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, run: Run) -> Tensor:
        number = next(_KEYS)
        _RUNS[number] = ctx.run = run
        ctx.uses = run.uses
        return torch.tensor(float(number), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def key_of(plan: Plan, capture: Capture, known: Mapping[fx.Node, Any]) -> Tensor:
    """For one run of a private graph, of whose uses the tape takes note."""
    run = Run(capture.tape, tuple(use.taped(capture, known) for use in plan.uses.values()))
    key: Tensor = Key.apply(capture.tape.anchor, run)  # type: ignore[no-untyped-call]
    return key


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
