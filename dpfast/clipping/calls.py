"""The calls of a model inside a step: how many rows they take, and the forward probe of each."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpfast.clipping.capture import Capture
from dpfast.clipping.ownership import ENOUGH_STEPS, MOST_PATHS
from dpfast.clipping.problems import Problem, listed, refuse
from dpfast.clipping.synthetic import Synthetic, Verdict, forward_verdict, is_mask, repeated_verdict, thorough_verdict
from dpfast.clipping.trees import leaves, replace_tensors, tensors_in
from dpfast.clipping.watch import changed, seen
from dpfast.errors import CaptureError
from dpfast.seeding import RandomState

Said = Verdict | Literal["mixed, or square"]
_PLAIN = (bool, int, float, str, type(None))
FEW_EXAMPLES = 8  # of a probe that is repeated
FAINT = 1e-2  # times an activation of 1, and rounding to 1e-5 of it: a tenth of a percent still shows


@contextmanager
def no_trace_left(model: nn.Module) -> Iterator[None]:
    """What a probe does to random states, buffers and attributes of modules is undone; not to what attributes hold."""
    state, buffers = RandomState(), dict(model.named_buffers())
    held = [(module, dict(module._buffers), dict(vars(module))) for module in model.modules()]
    copies, before = {name: b.clone() for name, b in buffers.items()}, seen(buffers)
    try:
        with torch.no_grad():
            yield
    finally:
        state.restore()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for module, own, attributes in held:  # some layers put new tensors in the place of old ones
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(own)
            for name in changed(before, seen(buffers)):  # the others may be saved for a backward pass
                buffers[name].copy_(copies[name])


class Autocast:
    """Of the CPU and the GPU, now."""

    def __init__(self) -> None:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_initialized() else [])]
        self.now = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.now:
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
            yield


@dataclass
class Call:
    """One call of a module by the user's code, and what the step had run before and after it.

    optional: made without gradients, and of interest only if it has the rows of the losses.
    """

    module: Callable[..., Any]  # a module, or a compiled region
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: RandomState
    autocast: Autocast
    before: int
    optional: bool
    after: int = 0

    def shape(self) -> Hashable:
        """Calls of one shape are probed once."""
        given = (*self.args, *self.kwargs.values())
        kinds = tuple(
            (repr(value) if isinstance(value, _PLAIN) else type(value), *(tuple(t.shape) for t in tensors_in(value)))
            for value in given
        )
        return self.module, kinds, tuple(self.kwargs)

    def verdict(
        self, capture: Capture, rows: int, augmult: int, seed: int | None, *, compiled: bool
    ) -> tuple[Said, bool]:
        """Of the forward probe, with the weights as they are and, the first time, without those that hide and on other
        input; whether it ran what the step ran. seed: of the examples that are changed (None: the first time).

        After the first time a few examples will do, where the model runs on a smaller batch as on this one. compiled:
        another size of batch would be compiled anew.
        """
        given, batch = (self.args, self.kwargs), Synthetic(rows, augmult)
        if not batch.dims(given):
            return "apart" if self.optional else "unseen", True
        if seed is not None and batch.examples > FEW_EXAMPLES and not compiled:
            with suppress(CaptureError):
                first = replace_tensors(given, lambda t: batch.first(t, FEW_EXAMPLES))
                found = self._said(capture, first, Synthetic(FEW_EXAMPLES * augmult, augmult), seed)
                if found == ("apart", True):
                    return found
        return self._said(capture, given, batch, seed)

    def _said(self, capture: Capture, given: Any, batch: Synthetic, seed: int | None) -> tuple[Said, bool]:
        args, kwargs = given
        same_path = True

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal same_path
            self.state.restore()
            with self.autocast.again(), capture.tracing_only(self.before) as trace:
                output = self.module(*args, **kwargs)
                same_path = same_path and trace() == self.after
            return output

        def probed(numbers: Synthetic) -> Verdict:
            nonlocal same_path
            same_before = same_path
            try:
                return forward_verdict(run, args, kwargs, numbers, public=is_mask, seed=seed)
            finally:
                if numbers is not batch:  # what other weights and inputs call is not what the step called
                    same_path = same_before

        try:
            if seed is None:
                said: Said = thorough_verdict(probed, batch, lambda: brought_out(capture.parameters.values()))
            else:
                said = repeated_verdict(probed, batch, seed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if batch.dims(given) == {1}:  # as many features as rows, by chance
                return "unseen", True
            raise CaptureError(
                "the model fails on synthetic input of the batch's own shapes, by which it is shown that it keeps"
                f" examples apart ({type(error).__name__}: {error}). Let it run on any numbers in its inputs' range"
            ) from error
        if said == "mixed" and any(map(batch.square, tensors_in(given))):
            said = "mixed, or square"
        return said, same_path

    def hidden(self, capture: Capture, rows: int, augmult: int) -> list[str]:
        """What the probe cannot vary: arguments of types it does not look into, lists with something for each row or
        example, tensors with rows elsewhere than it looks for them, and tensors left on modules.
        """
        opaque = [type(value).__name__ for value in leaves((self.args, self.kwargs)) if not _looked_into(value)]
        batch = Synthetic(rows, augmult)
        given = (*self.args, *self.kwargs.values())
        opaque += [
            f"a {type(value).__name__} of {len(value)}"
            for value in given
            if isinstance(value, list | tuple) and len(value) in (rows, batch.examples) and not tensors_in(value)
        ]
        opaque += [
            f"a tensor {list(t.shape)}"
            for t in tensors_in(given)
            if batch.dim(t) is None and capture.may_be_data(t) and any(n and n % batch.examples == 0 for n in t.shape)
        ]
        left = [
            f"{type(module).__name__}.{name}"
            for module in (self.module.modules() if isinstance(self.module, nn.Module) else ())
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules")
            and any(t.ndim and t.shape[0] == batch.rows and batch.dim(t) == 0 for t in tensors_in(value))
        ]
        return sorted({*opaque, *left})


def runs_compiled(module: nn.Module) -> bool:
    """Whether its forward is ``torch.compile``'s."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """Calls ``model`` compiled, and leaves no mark on it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # torch.compile keeps a few results for each code object
    return torch.compile(call, dynamic=False)


def _kind_of_compiled() -> set[type]:
    """The class of what ``torch.compile(module)`` returns, if there can be one."""
    dynamo = sys.modules.get("torch._dynamo")
    return set() if dynamo is None else {dynamo.eval_frame.OptimizedModule}


def _looked_into(value: Any) -> bool:
    known = (*_PLAIN, Tensor, nn.Module, torch.dtype, torch.device, torch.Generator, torch.memory_format)
    return isinstance(value, known) or callable(value)


@contextmanager
def brought_out(parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """Random numbers in the place of parameters so small that what goes through them does not show.

    Yields whether there are any. What autograd has saved of them is not counted as changed.
    """
    faint = [p for p in parameters if p.numel() and bool(p.detach().abs().amax() < FAINT)]
    kept = [p.detach().clone() for p in faint]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in faint:
            noise = torch.randn(p.shape, generator=generator)
            p.data.copy_(noise / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
        yield bool(faint)
    finally:
        for p, value in zip(faint, kept, strict=True):
            p.data.copy_(value)


class ModelCalls:
    """Sees the calls of a model's modules for the length of a ``with`` block.

    Through ``__call__`` of their classes, which is replaced meanwhile: hooks on every module cost 46 ms a step on a
    UNet of 300 modules, and replacing that of ``nn.Module`` makes Python look up every method anew. Of the modules of
    ``model``, those that the user's code calls directly (the model itself, usually) are probed once for every path: the
    functions that a step called, the training modes of the layers, and what is trained.
    """

    def __init__(self, model: nn.Module, augmult: int, *, compiles: bool = False) -> None:
        """compiles: whether calls of the model itself are compiled."""
        self.model, self.augmult = model, augmult
        self._compiled = _compiled(model) if compiles and not runs_compiled(model) else None
        self._capture: Capture | None = None
        self._shown: set[Hashable] = set()
        self._before_updates: set[Hashable] = set()  # paths shown with earlier weights
        self._tries: Counter[Hashable] = Counter()
        self._times = 0  # that everything was forgotten
        self._modules: list[nn.Module] = []
        self._depth = 0
        self._handed_over = False  # to the compiled model, which calls the model itself where it cannot be compiled
        # Class, the call of its own if it has one, what stands there now.
        self._watched: list[tuple[Any, Any, Any]] = []
        self.restart()

    def path(self) -> Hashable:
        """What the step has run so far."""
        assert self._capture is not None
        modes = tuple(module.training for module in self._modules)
        return self._capture.tape.trace, modes, tuple(self._capture.parameters)

    def begin(
        self, capture: Capture, modules: list[nn.Module], *, one_by_one: bool = False, compiles: bool = False
    ) -> None:
        """Watch the model until ``end``.

        modules: all of its. one_by_one: whether autograd itself differentiates a batch of one example. compiles:
        whether compiled modules run compiled.
        """
        self._capture, self.one_by_one = capture, one_by_one
        self.restart()
        self._modules = modules
        own = {id(module) for module in self._modules}
        kinds = {type(module) for module in self._modules} | _kind_of_compiled()
        # The usual calls are looked up before any is replaced: one kind may inherit another's.
        self._watched = [
            (kind, vars(kind).get("__call__"), self._watching(kind.__call__, capture, own, compiles=compiles))
            for kind in kinds
        ]
        self.resume()

    def _watching(
        self, usual: Callable[..., Any], capture: Capture, own: set[int], *, compiles: bool
    ) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth or self._capture is not capture or torch.compiler.is_compiling():
                return usual(module, *args, **kwargs)
            original = module._modules.get("_orig_mod") or module  # of what torch.compile returned
            if id(original) not in own or (compiles and runs_compiled(module)):  # its regions are watched instead
                return usual(module, *args, **kwargs)
            if compiles and module is self.model and self._compiled is not None and not self._handed_over:
                self._handed_over = True
                try:
                    return self._compiled(*args, **kwargs)
                finally:
                    self._handed_over = False
            return self.watch(original, args, kwargs, lambda: usual(module, *args, **kwargs))

        return watched

    def watch(
        self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]
    ) -> Any:
        """``run()``, which calls ``module``: a call of the user's, unless it is made inside another."""
        if self._depth:
            return run()
        self._depth = 1
        try:
            self._before(module, args, kwargs)
            return run()
        finally:
            self._after()

    def resume(self) -> None:
        """Watch again, after ``pause``."""
        for kind, _, call in self._watched:
            kind.__call__ = call

    def pause(self) -> None:
        """Put the usual calls back, unless somebody has put another in the place of ours (which then does nothing)."""
        for kind, usual, call in self._watched:
            if vars(kind).get("__call__") is call:
                if usual is None:
                    del kind.__call__
                else:
                    kind.__call__ = usual

    def end(self) -> None:
        """Watch no more."""
        self.pause()
        self._watched = []
        self.restart()
        self._capture = None

    def restart(self) -> None:
        """Forget the calls of the last step."""
        self._calls: list[Call] = []
        self._depth = 0
        self._open: Call | None = None
        self.inputs: list[Tensor] = []  # of the first call

    def _before(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self._capture
        if capture is None or capture.tape.receive is not None:
            return
        with_grad = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            given = list(tensors_in((args, kwargs)))
            for t in given:
                capture.take_for_data(t)
            rows = next((t.shape[0] for t in given if t.ndim), None)
            if rows is not None and with_grad and not capture.started:
                self.inputs = given
                if all(t.shape[0] == rows for t in given if t.ndim):
                    capture.batch = (rows, rows // self.augmult)
                capture.detach = not (self.one_by_one and 0 < rows <= self.augmult)  # all rows of one example, or some
            if not self._calls and not capture.started:
                capture.tape.trace = 0  # what the user's code did before is none of the model's path
            self._open = Call(
                module, args, kwargs, RandomState(), Autocast(), capture.tape.trace, optional=not with_grad
            )
            self._calls.append(self._open)
            capture.inside_model = True

    def _after(self) -> None:
        self._depth = 0
        if self._capture is not None and self._open is not None:
            self._open.after = self._capture.tape.trace
            self._open = None
            self._capture.inside_model = False

    @property
    def repeats(self) -> bool:
        """Whether what the step has run was shown with earlier weights, and not since."""
        path = self.path()
        return path in self._before_updates and path not in self._shown

    def show(self, rows: int) -> str:
        """Probe what was called; refused if it mixes examples. What could not be shown, in words, or nothing."""
        path = self.path()
        if path in self._shown or rows <= self.augmult:  # one example alone meets nobody
            return ""
        words, may_come = self._probe(rows, seed=self._times if path in self._before_updates else None)
        self._tries[path] += 1
        if len(self._shown) > MOST_PATHS:
            self.forget()
        given_up = self._tries[path] >= ENOUGH_STEPS
        if given_up or not words:
            self._shown.add(path)
        return "" if may_come and not given_up else words

    def forget(self, *, wholly: bool = False) -> None:
        """Show every path anew; with a few changed examples, unless wholly."""
        self._before_updates |= self._shown
        if len(self._before_updates) > MOST_PATHS or wholly:
            self._before_updates.clear()
        self._shown.clear()
        self._tries.clear()
        self._times += 1

    def _runs_compiled(self, module: Callable[..., Any]) -> bool:
        return self._compiled is not None or not isinstance(module, nn.Module) or runs_compiled(module)

    def _probe(self, rows: int, seed: int | None) -> tuple[str, bool]:
        """What was not shown of the path, in words or nothing, and whether another batch may show it."""
        names = {id(m): name.removeprefix("_orig_mod").removeprefix(".") for name, m in self.model.named_modules()}
        assert self._capture is not None
        calls = list({call.shape(): call for call in reversed(self._calls)}.values())
        self._depth = 1  # what the probe calls is no call of the user's
        with no_trace_left(self.model):
            verdicts = [
                call.verdict(self._capture, rows, self.augmult, seed, compiled=self._runs_compiled(call.module))
                for call in calls
            ]
        self._depth = 0
        said = {verdict for verdict, _ in verdicts}
        if said & {"mixed", "mixed, or square"}:
            what = "changing one example's input changes the model's output for another example"
            cure = (
                "remove what mixes rows: statistics over the batch, even behind detach(). Public tensors that have as"
                " many rows as the batch, or examples, by chance belong into a buffer, not into the arguments"
            )
            if "mixed" not in said:
                cure += "; if the rows are in dimension 1, begin with a batch of another size than the sequence's"
            refuse([Problem((), what, cure)])
        if "spoiled" in said:
            what = "one example whose numbers are not finite makes the model's output for other examples so"
            cure = (
                "keep the rows of the examples in places of their own (attention over [B, ...], not over one sequence"
                " of all of them under a mask: 0 * NaN is NaN), or replace such numbers first (torch.nan_to_num)"
            )
            refuse([Problem((), what, cure)])
        if "unrepeatable" in said:
            return "it gives two results for one input (a generator of its own, a counter)", False
        if not calls or "unseen" in said:
            return "it was not called with rows [B*K, ...] from which tensors with rows come out", False
        if "unmoved" in said:
            return "its output does not depend on its input", False
        hidden = sorted({name for call in calls for name in call.hidden(self._capture, rows, self.augmult)})
        if hidden:
            return (
                f"it reads {listed(hidden)}, which the probe cannot vary: hand tensors over as arguments, their rows"
                " along the first dimension"
            ), False
        called = {call.module for call in calls if not call.optional}
        regions = [part for part in called if id(part) not in names]  # one alone is the compiled model
        parts = sorted({names.get(id(part), "compiled") for part in called if part not in regions or len(regions) > 1})
        parts = [name for name in parts if name]
        if parts:
            return (
                f"its parts {listed(parts)} were called one by one, and what happens between them is unseen",
                False,
            )
        if "partly" in said:
            return "one of its inputs (labels, say) was 0 in every row, which the probe did not change", True
        if not all(same for _, same in verdicts):
            return "on synthetic input it calls other functions than on the batch's own", True
        return "", False
