"""The torch-function mode between the loader's giving a batch and ``loss.backward()``."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpfast.clipping.compiled import hide_from_tracing
from dpfast.clipping.functions import BACK_PROPAGATES, METADATA, READ_OUT, written_by
from dpfast.clipping.tape import traced
from dpfast.clipping.trees import tensors_in
from dpfast.engine import modes
from dpfast.engine.readings import READ
from dpfast.engine.shadows import World, call_in_all, read_in_all

_ONCE = READ_OUT | {  # tell Python something, or leave something behind: not called again for a shadow
    *(Tensor.retain_grad, Tensor.__hash__, Tensor.__dir__),
    *(getattr(Tensor, name).__get__ for name in ("grad", "_backward_hooks", "is_leaf", "output_nr", "_version")),
}
_GRAD = Tensor.grad.__get__  # type: ignore[union-attr]
_NORMS = frozenset((F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm))


class Session(Protocol):
    """Whom backward passes are handed to."""

    def backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def gradient(self, worlds: list[World], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def see_inside(self, given: Any) -> None: ...

    def see_read_of_sums(self, parameter: Tensor) -> None: ...


class Between(TorchFunctionMode):
    """Hands backward passes to the session, which it does not keep alive, and every other call to ``worlds``, too."""

    hidden_from_tracing = True

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = weakref.ref(session)
        self._on = False
        self._leaves: weakref.finalize[Any, Any] | None = None
        self.worlds: Sequence[World] = ()
        self.trace = 0  # of the functions called
        self.inside = False  # whether it is the private model that calls

    def open(self) -> None:
        """Begin to see."""
        self._on = True
        hide_from_tracing()
        modes.insert(self)
        if self._leaves is None and (session := self._session()) is not None:  # which may be dropped in mid-step
            self._leaves = weakref.finalize(session, modes.leave_to_sweep, self)

    def begin(self, worlds: Sequence[World]) -> None:
        """What is called from now on belongs to another batch."""
        self.worlds, self.trace = worlds, 0

    @contextmanager
    def within(self, *, watched: bool) -> Iterator[None]:
        """For a call of the private model: only what it reads of the user's code is seen, if it is ``watched``."""
        if not watched:
            self.close()
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            self.open()

    def close(self) -> None:
        """See no more. From inside a call that it sees, the mode leaves the stack with the next ``close``."""
        self._on = False
        modes.remove(self)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        session = self._session() if self._on else None
        if session is None:
            return func(*args, **kwargs)
        if func in BACK_PROPAGATES:
            return session.backward(func, args, kwargs)
        if func == _GRAD:
            session.see_read_of_sums(args[0])
        if self.inside:
            session.see_inside((args, kwargs))
            return func(*args, **kwargs)
        if func not in METADATA:
            self.trace = traced(self.trace, func)
        if self.worlds and torch._C._functorch.peek_interpreter_stack() is not None:
            self._see_transformed(args, kwargs)
            return func(*args, **kwargs)
        worlds = [world for world in self.worlds if not world.lost and _concerns(world, func, args, kwargs)]
        if func is torch.autograd.grad:
            return session.gradient(worlds, func, args, kwargs)
        if worlds and func in READ:
            return read_in_all(worlds, func, args, kwargs)
        if not worlds or func in _ONCE or func in METADATA:
            return func(*args, **kwargs)
        return call_in_all(
            worlds, func, args, kwargs, [*written_by(func, args, kwargs), *_statistics(func, args, kwargs)]
        )

    def _see_transformed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call inside of a transform of torch.func, whose tensors are those of outside in wrappers."""
        inside = [_unwrapped(t) for t in tensors_in((args, kwargs))]
        for world in self.worlds:
            if world.knows(inside):
                world.lose("torch.func, torch.vmap")


def _concerns(world: World, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return world.knows((args, kwargs)) or world.readings.guesses(func, args, kwargs)


def _unwrapped(t: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def _statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The running statistics that a normalisation may change."""
    if func not in _NORMS:
        return []
    return tensors_in((args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")))
