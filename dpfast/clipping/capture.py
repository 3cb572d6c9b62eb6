"""Intercept every use of a trainable parameter, whatever module or function it happens in.

For the length of one step a ``TorchFunctionMode`` sees each torch call. Tensors fall in four kinds:

- *tracked*: trainable parameters, and what is computed from them and constants alone (a scaled or standardised
  weight, a view, a concatenation). Derived tensors keep their graph, through which per-example gradients are pulled
  back to the parameters (``accumulate``).
- *constant*: buffers, frozen parameters, whole-number ranges and the like made during the step, and what is computed
  from constants alone. A tensor taken for a constant by mistake costs speed, never exactness: the pull-back is exact.
- *drawn*: random numbers, made of nothing else. They differ from *data* in one thing: reading them out is harmless.
- *data*: everything else.

A call with tracked and data arguments is a *use*: it runs with the tracked arguments detached, so that autograd
computes input gradients as always but no weight gradient, and a ``Tap`` on its output hands (a, g) to the tape.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dpfast.clipping.derived import Chain, Tracked, TrackedTensors, derive
from dpfast.clipping.fallback import fallback_use
from dpfast.clipping.functions import (
    ARITHMETIC,
    AS_ANOTHER,
    BACK_PROPAGATES,
    FACTORIES,
    INDEXED,
    LOWERED,
    METADATA,
    NUMBERS,
    ORDERS,
    PUTS_BACK,
    RANDOM,
    READ_OUT,
    SELECTS,
    SELECTS_BY_INDEX,
    random_state,
    selected_dims,
    storage,
    written_by,
)
from dpfast.clipping.problems import Problem
from dpfast.clipping.rules.table import COMPOSED, GUARDED, MIXES_ROWS, RULES
from dpfast.clipping.tape import Tape, Use, traced, unclipped
from dpfast.clipping.trees import TensorMap, function_name, leaves, own_lists, replace_tensors, tensors_in
from dpfast.clipping.watch import Standing

OnUse = Callable[[Any, tuple[Any, ...], dict[str, Any], Use, Any], None]  # function, arguments, how, result


class Constants(TensorMap):
    """Tensors taken for constants: whether they can be nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._places: set[int] = set()

    def __setitem__(self, t: Tensor, certain: bool) -> None:
        super().__setitem__(t, certain)
        self._places.add(storage(t))

    def forget(self, place: int) -> None:
        """All whose numbers lie there."""
        if place in self._places:
            self._places.discard(place)
            for t in self.keys():
                if storage(t) == place:
                    del self[t]


class Capture(TorchFunctionMode):
    """Active inside ``with clipper``; writes uses and problems to its ``tape``.

    parameters: the trainable ones. fixed: buffers and frozen parameters by name. anchor: requires grad, the same for
    all steps, so that uses of an earlier step are noticed. standing: likewise, what earlier steps have met. on_start:
    called at the first use of each step.

    ``detach``, decided before the first use: whether uses run with detached parameters. Not for a batch of one example
    in the form "example", whose gradient is the ordinary one: autograd computes it, and the capture only looks for what
    is refused.
    """

    hidden_from_tracing = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fixed: Mapping[str, Tensor],
        anchor: Tensor,
        on_start: Callable[[], None],
        standing: Standing | None = None,
    ) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.constants = Constants()
        for t in fixed.values():
            self.constants[t] = True
        self.drawn = TensorMap()
        self.selected = TensorMap()  # rows that data has picked: in another step they may have other owners
        self.counted = WeakTensorKeyDictionary()  # a buffer plus a number of Python's: of rows, of physical batches
        self.protected = {storage(t): name for name, t in (*fixed.items(), *parameters.items()) if t.numel()}
        self.protected.pop(0, None)  # sparse ones have no place
        self.anchor, self.on_start, self.standing = anchor, on_start, standing or Standing()
        self.probe_trace: int | None = None
        self.inside_model = False
        self.on_use: OnUse | None = None  # told of each use that goes to the tape
        self.run_region: Callable[[Any, tuple[Any, ...]], Any] | None = None  # runs a graph of torch.compile
        self._begin()

    def restart(self) -> None:
        """Forget the last forward pass: a tape serves one backward pass."""
        self.tape.close()
        self.constants.prune()
        self.drawn.prune()
        self.selected.prune()
        self._begin()

    def _begin(self) -> None:
        self.standing.next_step()
        self.tape = Tape(self.anchor)
        self.started, self.detach = False, True
        self.last_cast: tuple[weakref.ref[Tensor], Any, Tensor] | None = None
        self.batch = (0, 0)  # rows and examples of what went into the model, once it is known
        self.rewritten: set[str] = set()  # buffers that the step changes, not from data
        self.read_out = False  # whether numbers of the data have gone to Python
        self.tracked = TrackedTensors({id(p): Tracked(p, (n,), chain=Chain.of(p)) for n, p in self.parameters.items()})

    @contextmanager
    def tracing_only(self, trace: int) -> Iterator[Callable[[], int]]:
        """Record nothing, but go on with ``trace``; yields what it has become."""
        self.probe_trace = trace
        try:
            with torch._C._EnableTorchFunction():
                yield lambda: cast(int, self.probe_trace)
        finally:
            self.probe_trace = None

    def take_for_data(self, t: Tensor) -> None:
        """What goes into the model is data, unless it is the model's own or can be nothing else than a constant."""
        if not self.constants.get(t, True) and storage(t) not in self.protected:
            del self.constants[t]

    def may_be_data(self, t: Tensor) -> bool:
        """Whether a tensor is not known to be the model's own, or a constant."""
        return t not in self.constants and storage(t) not in self.protected

    def excuses(self, name: str, now: Tensor, *, replaced: bool) -> bool:
        """Whether a buffer that changed was computed from constants and parameters alone."""
        kept = replaced and self.constants.get(now, False) and now not in self.counted
        return not self.read_out and (name in self.rewritten or kept)

    def names_of(self, values: Iterable[Any]) -> tuple[str, ...]:
        """The names of the parameters that tracked ones among ``values`` are made of."""
        return _names([self.tracked[id(value)] for value in values if self.tracked(value)])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        if self.probe_trace is not None:
            self.probe_trace = traced(self.probe_trace, func)
            return func(*args, **kwargs)
        self.tape.trace = traced(self.tape.trace, func)
        if func is torch.broadcast_tensors:
            return self._broadcast(tensors_in(args))
        if func in BACK_PROPAGATES:
            return self._back_propagate(func, args, kwargs)
        tensors = tensors_in((args, kwargs) if kwargs else args)
        written = written_by(func, args, kwargs)
        tracked = [self.tracked[id(t)] for t in tensors if id(t) in self.tracked]
        data = [t for t in tensors if id(t) not in self.tracked and not self._is_constant(t)]
        if data and (func in READ_OUT or (func in INDEXED and _in_slices(args[1:2]) & {id(t) for t in data})):
            self.read_out = True
            if self.inside_model and not all(t in self.drawn for t in data):
                self.tape.read_out.add(function_name(func))
        if written and self._protects(func, args, kwargs, written, data):
            return self._harmless(func, args, kwargs)
        if tracked and torch.is_grad_enabled():
            if func is Tensor.__iter__:
                return iter(self.__torch_function__(Tensor.unbind, (), args))
            if not data or (func in AS_ANOTHER and self.tracked(args[0])):
                return self._derive(func, args, kwargs, tracked)
            if func in COMPOSED:
                return self._composed(COMPOSED[func], args, kwargs)
            if func not in AS_ANOTHER:
                selected = any(t in self.selected for t in tensors) if self.selected else False
                output = self._use(func, args, kwargs, tracked, written, selected=selected)
                return self._marked(output, selected=selected)
        elif tracked:
            self.tape.used_without_grad.update(name for source in tracked for name in source.names)
        picks = bool(data) and self._picks(func, args, kwargs, tensors, data)
        if picks:
            self.tape.picked_by.add(function_name(func))
        selected = picks or (bool(data and self.selected) and self._keeps_selected(func, tensors))
        if func in GUARDED:
            return self._marked(self._guarded(func, args, kwargs), selected=selected)
        output = func(*args, **kwargs)
        outputs = [*tensors_in(output), *written]
        self._note_constants(func, tensors, data, outputs, written)
        if selected:
            self.selected.update(outputs)
        if (func in ARITHMETIC and all(storage(t) in self.protected for t in tensors)) or (
            len(self.counted) and any(t in self.counted for t in tensors)
        ):
            self.counted.update(dict.fromkeys(outputs, True))
        return output

    def _back_propagate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a backward pass of the user's own, which may be of another model: it must not reach our parameters."""

        def grads() -> dict[str, tuple[int, int]]:
            return {name: (id(p.grad), p.grad._version) for name, p in self.parameters.items() if p.grad is not None}

        before = grads()
        output = func(*args, **kwargs)
        reached = tuple(name for name, grad in grads().items() if grad != before.get(name))
        for name in reached:
            self.parameters[name].grad = None  # with what was summed there before: this is no step any more
        if reached:
            self.tape.problems.append(unclipped(reached))
        return output

    def _picks(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], data: list[Tensor]) -> bool:
        """Whether data picks, in this call, the rows of what it returns."""
        if func in SELECTS:
            return func is not torch.where or len(tensors) == 1
        if func in ORDERS:
            place = 2 if func in (torch.topk, Tensor.topk) else 1
            dim = kwargs.get("dim", args[place] if len(args) > place else -1)
            return dim in (0, -tensors[0].ndim)
        if func in SELECTS_BY_INDEX and len(data) > 1 and data[0] is tensors[0]:
            if self.standing.holds(data[0]):
                return False
            if any(self._may_hold_rows(data[0], d) for d in selected_dims(func, args, kwargs, data[1:])):
                return True
            self.tape.picked_beside.add(self.batch[0])
            self.tape.picked_by.add(function_name(func))
        if func in PUTS_BACK:
            by_data = any(t is index for t in data for index in tensors[1:-1])
            dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", 0)
            placed = by_data and any(tensors[-1] is t for t in data) and tensors[-1] not in self.selected
            return bool(placed and dim in (0, -tensors[0].ndim))
        return False

    def _may_hold_rows(self, t: Tensor, dim: int) -> bool:
        """Whether the batch may lie along a dimension: not beside the first that has just its size, unless it has room
        for the batch itself. Whether the batch has that size shows when there are losses (``Tape.picked_beside``).
        """
        size, (rows, examples) = t.shape[dim], self.batch
        beside = dim > 0 and t.shape[0] == rows > 0 and size % rows and size != examples
        return not beside

    def _keeps_selected(self, func: Any, tensors: list[Tensor]) -> bool:
        """Whether what a call returns has rows that were picked before: some go back to where they belong."""
        return any(t in self.selected for t in (tensors[:1] if func in PUTS_BACK else tensors))

    def _marked(self, output: Any, *, selected: bool) -> Any:
        """``output``, after taking note that its rows were picked by data, if they were."""
        if selected:
            self.selected.update(tensors_in(output))
        return output

    def _is_constant(self, t: Tensor) -> bool:
        """One that autograd follows has been written into by another name."""
        return t in self.constants and not (t.requires_grad and t.grad_fn is not None)

    def _broadcast(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        """Each tensor is expanded by itself: only their shapes meet."""
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        return tuple(self.__torch_function__(Tensor.expand, (), (t, shape)) for t in tensors)

    def _protects(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], data: list[Tensor]) -> bool:
        """Whether a call would write data into a parameter or buffer, by whatever name: it is refused, not run."""
        names = [self.protected[storage(t)] for t in written if storage(t) in self.protected]
        if all(storage(t) in self.protected for t in data):
            if names and not self._counts(args, kwargs, written):
                self.rewritten.update(names)
            return False
        if not names:
            return False
        what = f"{function_name(func)} writes into it during a private step: it would carry private data"
        cure = (
            "freeze it (eval mode, no running statistics), or update it from public data outside `with clipper`; the"
            " noised update of a parameter is DPOptimizer's"
        )
        self.tape.problems.append(Problem(tuple(names), what, cure))
        return True

    def _counts(self, args: Any, kwargs: Any, written: list[Tensor]) -> bool:
        """Whether Python's numbers go into what is written: they may be the size of the batch."""
        given = [value for value in leaves((args, kwargs)) if not any(value is t for t in written)]
        numbers = any(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
        sources = [value for value in given if isinstance(value, Tensor)]
        return (numbers and not sources) or not all(self.constants.get(t, True) for t in sources)

    def _derive(self, func: Any, args: Any, kwargs: Any, sources: list[Tracked]) -> Any:
        """Run a call on tracked tensors and constants; what requires grad among its outputs is tracked."""
        args, kwargs = own_lists(args), own_lists(kwargs)
        output = func(*args, **kwargs)
        names = _names(sources)
        source = sources[0] if len(sources) == 1 else None
        written = written_by(func, args, kwargs)
        for index, tensor in enumerate((*tensors_in(output), *written)):
            if tensor.requires_grad and id(tensor) not in self.tracked:
                chain, base = (None, None) if written else derive(func, args, kwargs, source, tensor, index)
                self.tracked[id(tensor)] = Tracked(tensor, names, tensor._version, chain, base)
            elif not tensor.requires_grad and func not in RANDOM:
                self.constants[tensor] = True
        for tensor in written:
            self.tracked.rename(tensor, names)
        return output

    def _composed(self, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a call as the simpler calls it is made of, each seen by the capture; to the trace it is one call."""
        trace = self.tape.trace
        with self:
            output = compute(*args, **kwargs)
        self.tape.trace = trace
        return output

    def with_bases(self, targets: list[Tensor]) -> list[Tensor]:
        """Tracked tensors, and what they were expanded from."""
        return targets + [base for t in targets if (base := self.tracked.base(t)) is not t]

    def start(self) -> None:
        """At the first use of a step."""
        if not self.started:
            self.started = True
            self.on_start()

    def _use(
        self, func: Any, args: Any, kwargs: Any, tracked: list[Tracked], written: list[Tensor], *, selected: bool
    ) -> Any:
        args, kwargs = own_lists(args), own_lists(kwargs)
        self.start()
        names = _names(tracked)
        given = self._lowered(func, args, kwargs)
        use = self._use_of(func, *given, names, written)
        if isinstance(use, Problem):
            self.tape.problems.append(Problem(names, f"{function_name(func)}: {use.what}", use.cure))
            return self._harmless(func, args, kwargs)
        use = replace(use, selected=True) if selected else use
        random_before = None if use.ruled else random_state()
        if use.backward and not all(t is use.saved[0] or self.tracked(t) for t in tensors_in(given)):
            use = replace(use, backward=None)  # autograd brings gradients to the others, and sees whether they change
        by_itself = use.backward is not None and self.detach
        with torch.no_grad() if by_itself else nullcontext():
            output = self._run(func, *given)
        if random_before is not None and any(t.is_floating_point() for t in tensors_in(output)):
            self._check_fallback(func, names, random_before)
        if output is None:
            self.tape.problems.append(
                Problem(
                    names,
                    f"{function_name(func)} writes a trainable parameter into another tensor",
                    "use the parameter itself (x = p instead of x.data = p)",
                )
            )
        if self.on_use is not None and self.detach:
            self.on_use(func, args, kwargs, use, output)
        targets = self.with_bases([source.tensor for source in tracked])  # twice in one call is used twice
        if isinstance(output, Tensor):
            self._no_longer_constant(written)
            return self._attach(output, use, func, names, targets, in_place=bool(written))
        if isinstance(output, tuple | list):  # each result is a use of its own: gradients add up
            uses = [fallback_use(func, args, kwargs, self.tracked, names=names, result=i) for i in range(len(output))]
            results = zip(output, [replace(cast(Use, u), selected=selected) for u in uses], strict=True)
            attach = partial(self._attach, func=func, names=names, targets=targets, in_place=False)
            return type(output)([attach(o, u) for o, u in results])
        return output

    def _lowered(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with data in the dtype in which autocast computes: one copy serves autograd and the tape."""
        if func not in LOWERED or not torch._C._is_any_autocast_enabled():
            return args, kwargs
        kind = next(t.device.type for t in tensors_in((args, kwargs)))
        if not torch.is_autocast_enabled(kind):
            return args, kwargs
        dtype = torch.get_autocast_dtype(kind)

        def lowered(t: Tensor) -> Tensor:
            return t if self.tracked(t) or t.dtype != torch.float32 else self._cast(t, dtype)

        return replace_tensors((args, kwargs), lowered)

    def _cast(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Once for all calls in a row that take it: queries, keys and values have one input."""
        key = t._version, dtype, torch.is_grad_enabled()
        if self.last_cast is None or self.last_cast[0]() is not t or self.last_cast[1] != key:
            self.last_cast = weakref.ref(t), key, t.to(dtype)
        return self.last_cast[2]

    def _use_of(
        self, func: Any, args: Any, kwargs: Any, names: tuple[str, ...], written: list[Tensor]
    ) -> Use | Problem:
        if any(map(self.tracked, written)):
            return Problem(
                (),
                "a change in place, with data, of a tensor that was computed from parameters alone",
                "use the operation's out-of-place form (h = h - x instead of h.sub_(x) or h -= x)",
            )
        use = self._rule(func, args, kwargs)
        return fallback_use(func, args, kwargs, self.tracked, names=names) if use is None else use

    def _attach(
        self, output: Any, use: Use, func: Any, names: tuple[str, ...], targets: list[Tensor], *, in_place: bool
    ) -> Any:
        if self.detach and isinstance(output, Tensor) and output.is_complex():
            what = f"{function_name(func)}: a complex result, of which per-example gradients are not computed"
            cure = "compute with real and imaginary parts (torch.view_as_real), or freeze the parameter"
            self.tape.problems.append(Problem(names, what, cure))
        if not self.detach or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return self.tape.attach(output, use, self.tape.site(function_name(func), names), targets, in_place=in_place)

    def _rule(self, func: Any, args: Any, kwargs: Any) -> Use | Problem | None:
        rule = RULES.get(func)
        if rule is None:
            return None
        try:
            return rule(self.tracked, *args, **kwargs)
        except TypeError:  # an overload whose arguments the rule does not know
            return None

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.detach:
            return func(*args, **kwargs)

        def detached(t: Tensor) -> Tensor:
            return t.detach() if id(t) in self.tracked else t

        given = {name: replace_tensors(value, detached) for name, value in kwargs.items()}
        return func(*[replace_tensors(value, detached) for value in args], **given)

    def _guarded(self, func: Any, args: Any, kwargs: Any) -> Any:
        problem = RULES[func](self.tracked, *args, **kwargs)
        if isinstance(problem, Problem):
            self.tape.problems.append(problem)
            return self._harmless(func, args, kwargs)
        return func(*args, **kwargs)

    def _harmless(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Let the forward pass go on after a problem, so that all problems are found, without touching any state."""
        if func in MIXES_ROWS:  # a batch of one row would be an error
            return (args[0] if args else kwargs["input"]).clone()

        def copied(t: Tensor) -> Tensor:
            return t.detach().clone() if id(t) in self.tracked or storage(t) in self.protected else t

        return func(*replace_tensors(args, copied), **replace_tensors(kwargs, copied))

    def _no_longer_constant(self, written: list[Tensor]) -> None:
        """Data was written into them, and so into all that share their memory."""
        for t in written:
            self.constants.forget(storage(t))

    def _note_constants(
        self, func: Any, tensors: list[Tensor], data: list[Tensor], outputs: list[Tensor], written: list[Tensor]
    ) -> None:
        """What kind the results are of, from that of the arguments; ``data``: those of them that are data."""
        if tensors:
            made_from_constants = not data
            certain = made_from_constants and all(self.constants.get(t, True) for t in tensors)
        else:
            made_from_constants = certain = func in FACTORIES
        certain = certain and func not in NUMBERS
        if written and not made_from_constants:
            self._no_longer_constant(written)
        for t in outputs:
            if made_from_constants and func not in RANDOM:
                self.constants[t] = certain
            elif t in self.constants:
                del self.constants[t]
            elif all(s in self.drawn or s in self.constants for s in tensors):
                self.drawn[t] = True
            elif t in self.drawn:
                del self.drawn[t]

    def _check_fallback(self, func: Any, names: tuple[str, ...], random_before: Tensor) -> None:
        """The fallback runs the call again: it must not be random."""
        self.tape.fallbacks.setdefault(function_name(func), []).extend(names)
        if not torch.equal(random_before, random_state()):
            self.tape.problems.append(
                Problem(
                    names,
                    f"{function_name(func)} draws random numbers, and dpfast has no rule for it",
                    "move the dropout out of the call, or set its rate to 0",
                )
            )


def _in_slices(index: Any) -> set[int]:
    """The tensors by which slices of an index are bounded, by id."""
    parts = [part for value in index for part in (value if isinstance(value, tuple) else (value,))]
    return {id(t) for part in parts if isinstance(part, slice) for t in tensors_in(part)}


def _names(sources: list[Tracked]) -> tuple[str, ...]:
    """Of the parameters that they are made of, each once."""
    return tuple(dict.fromkeys([name for source in sources for name in source.names]))
