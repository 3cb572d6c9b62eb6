"""Compiled models inside ``with clipper``.

There ``torch.compile`` hands every graph that it has traced to ``private_backend`` instead of to its own compiler. The
first time that a graph runs, the capture sees its calls one by one, as it sees those of an eager model: every check is
the same. When a whole step has accepted them, a private graph runs instead (``private``), which reports the same uses:
ownership is shown, forms are chosen and gradients are clipped as ever.

A graph is a straight line under the guards of ``torch.compile``: the calls that were looked at are the calls that run.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._device import DeviceContext

from dpfast.clipping.calls import ModelCalls
from dpfast.clipping.capture import Capture
from dpfast.clipping.functions import storage, written_by
from dpfast.clipping.private import Kind, Like, Plan, Recorded, key_of, placeholders
from dpfast.clipping.problems import listed
from dpfast.clipping.tape import Use, traced
from dpfast.clipping.trees import function_name, replace_tensors, tensors_in
from dpfast.errors import CaptureError


@contextmanager
def private_compilation() -> Iterator[bool]:
    """Inside, compiled functions and modules go to ``private_backend``, whatever backend they were given.

    Yields whether they do: not before the first ``torch.compile`` of the process (which imports what this would), nor
    where compilation is switched off by ``torch.compiler.set_stance("force_eager")``.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or dynamo.eval_frame._stance.stance == "force_eager":
        yield False
        return
    hide_from_tracing()
    refuse_to_be_compiled()
    with torch.compiler.set_stance("default", force_backend=private_backend):
        yield True


def refuse_to_be_compiled() -> None:
    """Raises ``CaptureError`` where ``torch.compile`` runs, or traces, what called this."""
    if "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False):
        raise CaptureError(
            "a private model cannot be compiled from outside: give torch.compile the module before it is made private"
            " (model = torch.compile(model); then make_private, or GhostClipper(model)), and not the loop around it"
        )


def hide_from_tracing() -> None:
    """From now on ``torch.compile`` traces what it finds as if our modes were not there, whose Python it would trace.

    Its guards still look at the modes, so what was compiled under one is not run without it. Nothing is done before the
    first ``torch.compile`` of the process, which imports what this would.
    """
    if "torch._dynamo" not in sys.modules:
        return
    state: Any = torch._dynamo.variables.torch_function.SymbolicTorchFunctionState
    usual = state.__init__
    if hasattr(usual, "hides"):
        return

    def without_ours(self: Any, modes: Any, *rest: Any, **named: Any) -> None:
        usual(self, [mode for mode in modes if not hasattr(mode, "hidden_from_tracing")], *rest, **named)

    without_ours.hides = True  # type: ignore[attr-defined]
    state.__init__ = without_ours


def is_miscompiled(weight: Tensor) -> bool:
    """Whether inductor of torch 2.13 makes a wrong gradient of what is computed before: most of a UNet2DModel's are 0
    (two DownBlock2D of 32 and 64 channels at 16x16 are enough), private or not.
    """
    return weight.device.type == "cpu" and weight.ndim > 3 and not weight.is_contiguous()


def private_backend(graph: fx.GraphModule, _example_inputs: Sequence[Any]) -> "Region":
    """One for all clippers: ``torch.compile`` keeps its results by backend, and only a few for each function."""
    return Region(graph)


class Region:
    """A graph that ``torch.compile`` has traced. Outside of a capture it is run as it is."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.plans: dict[Any, Plan] = {}  # by kinds of inputs
        self.trace = hash(tuple(node.target for node in graph.graph.nodes if node.op.startswith("call")))

    def __call__(self, *inputs: Any) -> Any:
        if not torch._C._is_torch_function_mode_enabled():
            return self.graph(*inputs)
        modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        captures = [mode for mode in modes if isinstance(mode, Capture)]
        others = [mode for mode in modes if not isinstance(mode, Capture | DeviceContext)]
        if len(captures) != 1 or others or captures[0].run_region is None:
            return self.graph(*inputs)
        return captures[0].run_region(self, inputs)


class Recorder(fx.Interpreter):
    """Runs a graph under the capture, node by node, and makes the plan for the next time."""

    def __init__(self, graph: fx.GraphModule, capture: Capture) -> None:
        super().__init__(graph)
        self.capture = capture
        self.uses: dict[fx.Node, Recorded] = {}
        self.fixed: dict[fx.Node, list[tuple[Tensor, int]]] = {}  # made of parameters and constants: with its version
        self.moving: set[fx.Node] = set()  # made of data
        self.unfit = ""

    def record(self, *inputs: Any) -> tuple[Any, Plan]:
        """The results, and the plan."""
        given = [(t, t._version) for t in tensors_in(inputs)]
        tape = self.capture.tape
        picked_before, tape.picked_beside = tape.picked_beside, set()
        self.capture.on_use = self.note
        try:
            results = self.run(*inputs)
        finally:
            self.capture.on_use = None
            picked = frozenset(tape.picked_beside)
            tape.picked_beside |= picked_before
        if any(t._version != version for t, version in given):
            self.unfit = self.unfit or "it changes its inputs in place"
        if any(map(self.capture.tracked, tensors_in(results))):
            self.unfit = self.unfit or "it returns parameters, or what is computed from them alone"
        before = self._before()
        outputs = [Kind.of(t, self.capture) for t in tensors_in(results)]
        return results, Plan(self.uses, before, outputs, picked, self.capture.batch, self.unfit)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, Tensor):
            self.capture.constants[result] = False  # numbers that stand in the program
        if n in self.uses and not hasattr(getattr(result, "grad_fn", None), "uses"):
            self.unfit = self.unfit or f"{function_name(n.target)} does more than the use inside it"
        tensors = tensors_in(result)
        if tensors and n.op != "placeholder":
            if all(self.capture.tracked(t) or t in self.capture.constants for t in tensors):
                self.fixed[n] = [(t, t._version) for t in tensors]
            else:
                self.moving.add(n)
        return result

    def note(self, func: Any, args: Any, kwargs: Any, use: Use, output: Any) -> None:
        """A use, told by the capture."""
        nodes = {id(value): node for node, value in self.env.items() if isinstance(value, Tensor)}
        given = tensors_in((args, kwargs))
        what = f"{function_name(func)} with {listed(self.capture.names_of(given))}"
        if not use.ruled:
            self.unfit = self.unfit or f"dpfast has no rule for {what}"
        elif self.node in self.uses:
            self.unfit = self.unfit or f"{function_name(self.node.target)} is one call with several uses"
        elif written_by(func, args, kwargs) or not isinstance(output, Tensor):
            self.unfit = self.unfit or f"{what} changes a tensor in place"
        elif any(self.capture.tracked(t) and is_miscompiled(t) for t in given):
            self.unfit = (
                self.unfit or f"torch.compile gets gradients wrong on the CPU where weights are channels_last: {what}"
            )
        elif not all(id(t) in nodes for t in given):
            self.unfit = self.unfit or f"{what} stands in a part of its own, such as a checkpoint"
        else:
            args, kwargs = replace_tensors((args, kwargs), lambda t: nodes[id(t)])
            self.uses[self.node] = Recorded(
                func,
                args,
                kwargs,
                inputs={nodes[id(t)]: Like.of(t) for t in given},
                targets=tuple(nodes[id(t)] for t in given if self.capture.tracked(t)),
                output=output.shape,
                selected=use.selected,
            )

    def _before(self) -> list[fx.Node]:
        """Nodes to run before the private graph, in order."""
        waiting = [node for use in self.uses.values() for node in use.inputs if node in self.fixed]
        needed: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node.op == "placeholder" or node in needed:
                continue
            needed.add(node)
            waiting.extend(node.all_input_nodes)
        written = any(t._version != version for node in needed for t, version in self.fixed.get(node, []))
        if written or needed & self.moving:
            self.unfit = self.unfit or "a weight that it computes depends on data, or is changed in place"
        return [node for node in self.graph.nodes if node in needed]


@dataclass(frozen=True)
class RegionCall:
    """A region with all inputs but data: what the forward probe calls."""

    region: Region
    inputs: tuple[Any, ...] = field(compare=False)
    data: tuple[int, ...]  # which inputs are

    def __call__(self, *data: Tensor) -> Any:
        inputs = list(self.inputs)
        for i, t in zip(self.data, data, strict=True):
            inputs[i] = t
        return self.region(*inputs)


class Regions:
    """The compiled regions of a clipper's model: each runs eagerly until a whole step has accepted what it does."""

    def __init__(self, calls: ModelCalls) -> None:
        self._calls = calls
        self._accepted: set[Any] = set()
        self._new: set[Any] = set()  # of this step

    def begin(self, capture: Capture) -> None:
        """Run regions under ``capture``."""
        self._capture = capture
        capture.run_region = self.run

    def end(self) -> None:
        """No reference cycle stays behind."""
        self._capture.run_region = None

    def accept(self) -> None:
        """What ran eagerly in this step was clipped without problems."""
        self._accepted |= self._new

    def restart(self) -> None:
        """Begin a step."""
        self._new = set()

    def run(self, region: Region, inputs: tuple[Any, ...]) -> Any:
        """As the user's code calls it."""
        capture = self._capture
        if capture.probe_trace is not None:
            capture.probe_trace = traced(capture.probe_trace, region.trace)
            with torch._C.DisableTorchFunction():
                return region.graph(*inputs)
        with torch._C.DisableTorchFunction():
            data = tuple(i for i, value in enumerate(inputs) if self._is_data(value))
        called = RegionCall(region, inputs, data)
        return self._calls.watch(called, tuple(inputs[i] for i in data), {}, lambda: self._run(region, inputs))

    def _is_data(self, value: Any) -> bool:
        tracked = self._capture.tracked(value)
        return isinstance(value, Tensor) and not tracked and storage(value) not in self._capture.protected

    def _run(self, region: Region, inputs: tuple[Any, ...]) -> Any:
        capture = self._capture
        before = capture.tape.trace
        with torch._C.DisableTorchFunction():
            kinds, names = self._kinds(inputs)
        key, plan = (region, kinds, names), region.plans.get(kinds)
        if plan is not None and plan.picked_beside and plan.batch != capture.batch:
            del region.plans[kinds]
            plan = None
        results = None
        recomputed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if recomputed:
            capture.tape.eager.add("it stands inside an activation checkpoint")
        elif plan is not None and key in self._accepted and not plan.unfit:
            results = self._run_private(region, plan, inputs)
        if results is None:
            results, made = Recorder(region.graph, capture).record(*inputs)
            plan = region.plans.setdefault(kinds, made)
            self._new.add(key)
        if plan is not None and plan.unfit:
            capture.tape.eager.add(plan.unfit)
        capture.tape.trace = traced(before, region.trace)
        return results

    def _kinds(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """What a plan depends on, and the names of the parameters."""
        capture = self._capture
        names = tuple(capture.tracked[id(value)].names for value in inputs if capture.tracked(value))
        kinds = tuple(self._kind(value) if isinstance(value, Tensor) else value for value in inputs)
        return (capture.detach, torch.is_grad_enabled(), kinds), names

    def _kind(self, t: Tensor) -> Any:
        what = "tracked" if self._capture.tracked(t) else Kind.of(t, self._capture)
        return what, t.shape, t.stride(), t.dtype, t.device, t.requires_grad

    def _run_private(self, region: Region, plan: Plan, inputs: tuple[Any, ...]) -> Any:
        """The results; nothing was run if ``plan`` turns out to be unfit."""
        capture = self._capture
        if torch.is_grad_enabled() and any(map(capture.tracked, inputs)):
            capture.start()
        runner = Recorder(region.graph, capture)
        known = runner.env
        known.update(zip(placeholders(region.graph), inputs, strict=True))
        for node in plan.before:
            known[node] = runner.run_node(node)
        with torch._C.DisableTorchFunction():
            entering = [*inputs, *(known[node] for node in plan.entering)]
            given = [self._detached(value) for value in entering if isinstance(value, Tensor)]
            plan.compile(region.graph, inputs, given)
            if plan.private is None:
                return None
            capture.tape.picked_beside |= plan.picked_beside
            results = plan.private(*given, key_of(plan, capture, known))
            for t, kind in zip(tensors_in(results), plan.outputs, strict=True):
                kind.give(t, capture)
        return results

    def _detached(self, t: Tensor) -> Tensor:
        return t.detach() if self._capture.detach and self._capture.tracked(t) else t
