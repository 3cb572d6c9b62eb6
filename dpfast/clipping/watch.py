"""The tensors of a model, and whether they changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

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
