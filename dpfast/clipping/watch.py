"""The tensors of a model and those of its caller, and whether they changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dpfast.clipping.trees import TensorMap
from dpfast.kernels.dispatch import PLAIN
from dpfast.kernels.fingerprint import fingerprints

Seen = dict[str, tuple[int, int]]  # by name: the identity of a tensor, and its fingerprint


@dataclass(frozen=True)
class Inventory:
    """Trainable parameters, frozen ones and buffers of a model by name, each tensor once, and its modules."""

    trainable: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    modules: list[nn.Module]
    prefixes: list[str]  # of the names of their tensors

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """In one walk over the modules, named as torch names them."""
        modules: list[nn.Module] = []
        prefixes: list[str] = []
        known: set[int] = set()

        def visit(module: nn.Module, prefix: str) -> None:
            known.add(id(module))
            modules.append(module)
            prefixes.append(prefix)
            for name, child in module._modules.items():
                if child is not None and id(child) not in known:
                    visit(child, f"{prefix}{name}.")

        visit(model, "")
        return cls._holding(modules, prefixes)

    def again(self) -> Self:
        """What the same modules hold now."""
        return self._holding(self.modules, self.prefixes)

    @classmethod
    def _holding(cls, modules: list[nn.Module], prefixes: list[str]) -> Self:
        found = cls({}, {}, {}, modules, prefixes)
        known: set[int] = set()
        for module, prefix in zip(modules, prefixes, strict=True):
            for name, p in module._parameters.items():
                if p is not None and id(p) not in known:
                    known.add(id(p))
                    (found.trainable if p.requires_grad else found.frozen)[prefix + name] = p
            for name, b in module._buffers.items():
                if b is not None and id(b) not in known:
                    known.add(id(b))
                    found.buffers[prefix + name] = b
        return found

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What a private step must leave as it is: buffers and frozen parameters."""
        return {**self.buffers, **self.frozen}


@torch.no_grad()
def seen(tensors: Mapping[str, Tensor]) -> Seen:
    """What to compare later."""
    numbers = fingerprints(list(tensors.values()))
    return {name: (id(t), number) for (name, t), number in zip(tensors.items(), numbers, strict=True)}


def changed(before: Seen, now: Seen) -> list[str]:
    """Names of tensors that came, went, were replaced or hold other numbers."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


class Standing:
    """Tensors of the caller that steps have looked numbers up in, by place (a table of a noise schedule).

    One that an earlier step has met, and that holds the same numbers now, holds no rows of this step's batch. The
    numbers are looked at: numpy writes into a tensor without telling torch.
    """

    MOST = 1 << 16  # numbers that are looked at in every step

    def __init__(self) -> None:
        self._met = TensorMap()  # the step in which it was first met so, and its fingerprint
        self._step = 0

    def next_step(self) -> None:
        """What is met from now on is met in another step."""
        self._step += 1
        self._met.prune()

    def holds(self, t: Tensor) -> bool:
        """Whether ``t`` stands; if not, it may do so in the next step."""
        if type(t) not in PLAIN or t.numel() > self.MOST or t.requires_grad:
            return False
        with torch._C.DisableTorchFunction():
            (now,) = fingerprints([t])
        step, before = self._met.get(t, (self._step, None))
        if before != now:
            step = self._step
        self._met[t] = (step, now)
        return bool(step < self._step)
