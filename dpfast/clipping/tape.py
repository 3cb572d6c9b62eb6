"""The tape of one private step: which parameters were used, and what their uses contribute."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem
from dpfast.clipping.rows import Rows
from dpfast.clipping.terms import FactoredTerm, Stored
from dpfast.errors import CaptureError


def traced(trace: int, func: Any) -> int:
    """The trace after a call of ``func``."""
    return hash((trace, func))


def place(t: Tensor) -> Hashable:
    """Where its numbers lie in memory, and how."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


@contextmanager
def plain() -> Iterator[None]:
    """Neither recorded by autograd nor seen by the capture."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        yield


class IsTracked(Protocol):
    """What rules may ask of a call's arguments: ``TrackedTensors``."""

    def __call__(self, value: Any) -> bool: ...

    def base(self, t: Tensor) -> Tensor: ...


Term = Stored | FactoredTerm
Terms = Sequence[tuple[Tensor, Term]]
# From the saved tensors, the output's gradient, and where the rows are.
MakeTerms = Callable[[tuple[Tensor, ...], Tensor, Rows], Terms]
MakeBoth = Callable[[tuple[Tensor, ...], Tensor, Rows], tuple[Tensor, Terms]]  # with the gradient of the input
# Told of each use in a backward pass; returns the gradient of the input where it has called ``use.backward``.
Receive = Callable[["TapedUse", tuple[Tensor, ...], Tensor], Tensor | None]


class Site(NamedTuple):
    """A place in the program: the function, the parameters it used, and its how-manieth call with them."""

    function: str
    names: tuple[str, ...]
    call: int

    def __str__(self) -> str:
        return f"{', '.join(self.names)} ({self.function})"


@dataclass(frozen=True)
class Use:
    """How a call used tracked tensors: what to save, and how saved tensors and the output's gradient make terms.

    backward: makes the gradient of the input, which is the first of ``saved``, along with the terms. It takes the place
    of autograd's backward pass, so it is left aside where the call has other tensors than the input and tracked ones.
    """

    saved: tuple[Tensor, ...]
    terms: MakeTerms
    row_dims: tuple[int, ...] | None = None  # dimensions of the output that may hold the rows; None: any
    backward: MakeBoth | None = None
    ruled: bool = True  # False: by the fallback
    selected: bool = False  # its rows were picked by data, which another step may do otherwise


Rule = Callable[..., Use | Problem | None]


def present(is_tracked: IsTracked, pairs: Iterable[tuple[Any, Callable[[], Term]]]) -> Terms:
    """Terms of those targets that are tracked; the others (frozen or None) cost nothing."""
    return [(target, make()) for target, make in pairs if is_tracked(target)]


@dataclass(frozen=True)
class TapedUse:
    """A use with its place in the program. Activations live in the graph and die with it (a fallback keeps its
    arguments until the tape ends).
    """

    site: Site
    terms: MakeTerms
    row_dims: tuple[int, ...] | None
    backward: MakeBoth | None = None
    selected: bool = False
    lent: bool = False  # others may write where its gradient and what it saved lie, once the tape has been told


def unclipped(names: tuple[str, ...]) -> Problem:
    """Of a backward pass that is not the clipper's."""
    return Problem(
        names,
        "back-propagated outside clipper.backward (by loss.backward(), or for a gradient penalty)",
        "call clipper.backward(losses) with one loss per row, once and in place of loss.backward(); second derivatives"
        " of private data are not supported",
    )


def _only_input(site: Site, saved: tuple[Tensor, ...]) -> Hashable:
    """By which uses of one function that save the same tensor, and nothing else, know each other."""
    return (site.function, place(saved[0])) if len(saved) == 1 and saved[0].layout == torch.strided else None


@dataclass
class Tape:
    """Lives for one forward and backward pass; a ``Tap`` behind every captured output reports its gradient here."""

    anchor: Tensor  # requires grad, so that every captured output does
    uses: dict[Site, TapedUse] = field(default_factory=dict)
    calls: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    shapes: dict[Site, torch.Size] = field(default_factory=dict)  # of the outputs
    trace: int = 0  # of every torch function called, in order
    inputs: Counter[Hashable] = field(default_factory=Counter)  # what uses of one function saved, by place in memory
    times_used: Counter[int] = field(default_factory=Counter)  # by id of the tracked tensor
    versions: dict[int, tuple[Tensor, int, tuple[str, ...]]] = field(default_factory=dict)  # of what was used
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # functions without a rule: parameters
    used_without_grad: set[str] = field(default_factory=set)  # parameters
    read_out: set[str] = field(default_factory=set)  # functions by which the model gave numbers of the data to Python
    picked_by: set[str] = field(default_factory=set)  # functions by which data picked rows, or what lies beside them
    picked_beside: set[int] = field(default_factory=set)  # or beside them, if the batch has so many
    reshown: bool = False  # whether uses had to be shown for such rows
    eager: set[str] = field(default_factory=set)  # why compiled regions ran eagerly, in words
    problems: list[Problem] = field(default_factory=list)
    receive: Receive | None = None  # set during a backward pass only
    closed: bool = False  # after its backward pass

    def site(self, function: str, names: tuple[str, ...]) -> Site:
        call = self.calls[function, names]
        self.calls[function, names] += 1
        return Site(function, names, call)

    def sharing(self, use: TapedUse, saved: tuple[Tensor, ...]) -> int:
        """How many uses of the function saved what this one did (0: not known)."""
        only = _only_input(use.site, saved)
        return self.inputs[only] if only else 0

    @contextmanager
    def receiving(self, receive: Receive) -> Iterator[None]:
        """Hand what taps report during one backward pass to ``receive``."""
        self.receive = receive
        try:
            yield
        finally:
            self.receive = None

    def attach(self, output: Tensor, use: Use, site: Site, targets: Iterable[Tensor], *, in_place: bool) -> Tensor:
        """``output``, with a ``Tap`` as the last node of its graph; ``targets`` are the tracked tensors used.

        in_place: whether ``output`` is one of the call's arguments, which it changed.
        """
        taped = TapedUse(site, use.terms, use.row_dims, use.backward, use.selected)
        self.note(taped, output.shape, targets)
        if not use.ruled:
            output = output.clone()  # the function may have saved its result, which Tap would mark as changed
        self.inputs[_only_input(site, use.saved)] += 1
        saved = [t.detach() for t in use.saved]  # no edges into their graphs; the version counter is shared
        source = use.saved[0] if use.backward else None
        tapped: Tensor = Tap.apply(  # type: ignore[no-untyped-call]
            output, source, self.anchor, self, taped, in_place, *saved
        )
        return tapped

    def note(self, use: TapedUse, shape: torch.Size, targets: Iterable[Tensor]) -> None:
        """That a use has happened, with an output of this shape."""
        if self.receive is not None:  # a forward recomputed during backward (checkpointing) is no new use
            return
        self.uses[use.site] = use
        self.shapes[use.site] = shape
        for target in targets:
            self.times_used[id(target)] += 1
            self.versions.setdefault(id(target), (target, target._version, use.site.names))

    def close(self) -> None:
        """After its backward pass: what it holds would keep the graph alive, which may hold the tape."""
        self.closed = True
        self.uses.clear()
        self.versions.clear()

    def changed_after_use(self) -> list[Problem]:
        """Weights that were changed in place after a use: their gradients would be pulled back through the change."""
        return [
            Problem(
                names,
                "changed in place after it (or what was computed from it) was used",
                "compute a new tensor (w = w * 2 instead of w.mul_(2))",
            )
            for tensor, version, names in self.versions.values()
            if tensor._version != version
        ]

    def record(self, use: TapedUse, saved: tuple[Tensor, ...], g: Tensor) -> Tensor | None:
        """Take note of an output's gradient; returns that of the input where the use makes it itself."""
        if self.closed:
            raise CaptureError(
                f"{use.site}: the losses come from a forward pass before the last clipper.backward, or in a block that"
                " was left; add up all losses of a row and call clipper.backward(losses) inside `with clipper`, once"
                " for each forward pass (a second call may only be for other examples)"
            )
        of_input = None
        with torch._C.DisableTorchFunction():
            if self.receive is None:
                self.problems.append(unclipped(use.site.names))
            else:
                of_input = self.receive(use, saved, g)
            if use.backward is not None and of_input is None:
                of_input, _ = use.backward(saved, g, Rows(1))
        return of_input


class Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient and the saved tensors to the tape.

    Of a use with a backward pass of its own, ``output`` has no graph: it is made to depend on ``source``, its input.
    Saved tensors go through ``save_for_backward``, so a change in place before the backward pass is an error.
    The output may be changed in place afterwards (``ReLU(inplace=True)``): it is marked as in-place itself or, where it
    is a view (of linear layers with 3-d inputs), a new tensor over the same memory. Marked views would hide their graph
    behind CopySlices and copy every gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        _source: Tensor | None,
        _anchor: Tensor,
        tape: Tape,
        use: TapedUse,
        in_place: bool,
        *saved: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.tape, ctx.uses = tape, (use,)
        if output._is_view() and not in_place:
            memory = output.untyped_storage()
            return output.new_empty(0).set_(memory, output.storage_offset(), output.shape, output.stride())
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        of_input = None if g is None else ctx.tape.record(*ctx.uses, ctx.saved_tensors, g)
        return (g, of_input, *[None] * (len(ctx.needs_input_grad) - 2))
