"""PrivateModule: the user's module, whose calls in training are parts of a private step."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from dpfast.clipping.compiled import refuse_to_be_compiled
from dpfast.engine.session import Session


class PrivateModule(nn.Module):
    """Stands in the place of ``module``: same attributes, parameters, names and state dict.

    A call in training mode, with gradients enabled, takes the batch that the private loader gave last and returns
    outputs that are cut off from the parameters: ``loss.backward()`` reaches these through the clipper alone. Any other
    call is the module's own. A copy (``copy.deepcopy``, pickle) is one of the module itself, without any privacy.
    """

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.__dict__["_inner"], mode = module, module.training
        super().__init__()
        module.training = mode  # nn.Module.__init__ has set it
        self.__dict__["_session"] = session

    @property
    def _module(self) -> nn.Module:
        """The module itself, by the name that it has in Opacus."""
        inner: nn.Module = self.__dict__["_inner"]
        return inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs."""
        if not (self.training and torch.is_grad_enabled()):
            return self._module(*args, **kwargs)
        refuse_to_be_compiled()
        session: Session = self.__dict__["_session"]
        return session.forward(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module has."""
        if name == "_inner":  # not set yet, while being copied
            raise AttributeError(name)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """On the module; hooks are this one's."""
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._module)})

    def __getitem__(self, index: Any) -> Any:
        return self._module[index]  # type: ignore[index]  # of a Sequential, or an error

    def __iter__(self) -> Iterator[Any]:
        return iter(self._module)  # type: ignore[call-overload]  # likewise

    def __len__(self) -> int:
        return len(self._module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"PrivateModule({self._module!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self._module, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._module,)

    @property
    def training(self) -> bool:
        """The module's mode."""
        return self._module.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._module.training = mode

    def train(self, mode: bool = True) -> Self:
        """Set the module's mode."""
        self._module.train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's signature
        """As the optimizer's: they are always set to None, and kept between the physical batches of one step."""
        session: Session = self.__dict__["_session"]
        session.zero_grad()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of all parameters."""
        self._module.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to``, ``cuda``, ``float`` and so on."""
        self._module._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """To every module in it."""
        self._module.apply(fn)
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The module and all in it: ``parameters()``, ``buffers()``, ``modules()`` come by here."""
        return self._module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The module's."""
        return self._module.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self._module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the module."""
        return self._module.load_state_dict(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """One of the module's, by name."""
        return self._module.get_submodule(target)


_OWN = frozenset(vars(nn.Module())) | {"training"}


def _itself(module: nn.Module) -> nn.Module:
    return module
