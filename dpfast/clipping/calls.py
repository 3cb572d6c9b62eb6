"""The calls of a model inside a step: how many rows they take, and the forward probe of each."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dpfast.clipping.capture import Capture
from dpfast.clipping.ownership import Synthetic, forward_verdict
from dpfast.clipping.problems import Problem, refuse
from dpfast.clipping.trees import tensors_in

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class ModelCalls:
    """Hooks on a model for the length of a ``with`` block.

    Of the modules of ``model``, those that the user's code calls directly (the model itself, usually) are probed once
    for every path: the functions that a step called, and the training modes of the layers.
    """

    def __init__(self, model: nn.Module, augmult: int, *, one_by_one: bool) -> None:
        """one_by_one: whether a batch of one example is differentiated by autograd itself (the form "example")."""
        self.model, self.augmult, self.one_by_one = model, augmult, one_by_one
        self._capture: Capture | None = None
        self.input_shape: tuple[int, ...] | None = None
        self._shown: set[Hashable] = set()
        self._handles: list[RemovableHandle] = []

    def path(self) -> Hashable:
        """What the step has run so far."""
        assert self._capture is not None
        return self._capture.tape.trace, tuple(module.training for module in self.model.modules())

    def begin(self, capture: Capture) -> None:
        """Watch the model until ``end``."""
        self._capture = capture
        self.restart()
        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    def end(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.restart()
        self._capture = None

    def restart(self) -> None:
        """Forget the calls of the last step."""
        self._calls: dict[int, Call] = {}
        self._depth = 0
        self.input_shape = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        self._calls.setdefault(id(module), (module, args, kwargs))
        with torch._C.DisableTorchFunction():
            shape = next((tuple(t.shape) for t in tensors_in((args, kwargs)) if t.ndim), None)
        if shape is not None and self._capture is not None and not self._capture.started:
            self.input_shape = shape
            self._capture.detach = not (self.one_by_one and shape[0] == self.augmult)

    def _after(self, *_: Any) -> None:
        self._depth -= 1

    def show(self, rows: int) -> bool:
        """Probe what was called. False if a call could not be probed; refused if one mixes examples."""
        path = self.path()
        if path in self._shown:
            return True
        batch = Synthetic(rows, self.augmult)
        self._depth = 1  # what the probe calls is no call of the user's
        verdicts = [forward_verdict(*call, batch) for call in self._calls.values()]
        if "mixed" in verdicts:
            what = "changing one example's input changes the model's output for another example"
            cure = (
                "remove what mixes rows: statistics over the batch, even behind detach(). Public tensors that have as"
                " many rows as the batch by chance belong into a buffer, not into the arguments"
            )
            refuse([Problem((), what, cure)])
        if "unseen" in verdicts or not verdicts:
            return False
        self._shown.add(path)
        return True
