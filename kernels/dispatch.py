"""Which implementation of an op runs: the compiled module ``dpfast._native``, or PyTorch (``reference``).

The native module and the environment are looked at once, at the first op, not at import. ``DPFAST_BACKEND=reference``
leaves the module aside, ``DPFAST_BACKEND=native`` makes its absence an error, ``auto`` (or nothing) takes it when it is
there.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from dpfast.errors import ConfigError, DPFastError

Backend = Literal["native", "reference"]

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype of csrc/dpfast.h
_ABI = 6  # kAbi of csrc/dpfast.h
_VARIABLE = "DPFAST_BACKEND"
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types with no behaviour of their own: no fake or other subclass


class KernelError(DPFastError, ValueError):
    """An op was called with shapes, dtypes or a backend it cannot compute with."""


def backend() -> Backend:
    """The backend that ops choose by themselves, as the environment said when it was first asked for.

    Raises:
        ConfigError: ``DPFAST_BACKEND`` is none of native, reference, auto, or native and missing.
    """
    return _decision()[0]


def why_not_native() -> str | None:
    """Why the native module is not used, in words for a person; None when it is used. Raises as ``backend``."""
    return _decision()[1]


@functools.cache
def _decision() -> tuple[Backend, str | None]:
    wanted = os.environ.get(_VARIABLE) or "auto"
    if wanted not in ("native", "reference", "auto"):
        raise ConfigError(f"{_VARIABLE}={wanted!r}: expected native, reference or auto")
    if wanted == "reference":
        return "reference", f"{_VARIABLE}=reference asks for PyTorch"
    module, reason = _find_native()
    if module is None and wanted == "native":
        raise ConfigError(f"{_VARIABLE}=native, but {reason}")
    return ("native" if module is not None else "reference"), reason


def native_module() -> ModuleType:
    """The module ``dpfast._native``.

    Raises:
        KernelError: it is missing or was built from other sources; the message says which.
    """
    module, reason = _find_native()
    if module is None:
        raise KernelError(f"backend 'native' was asked for, but {reason}")
    return module


def choose(requested: Backend | None, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Backend:
    """The backend for these tensors: ``requested``, or native when the native module can read them all.

    dtypes: those that the op's native kernel takes.
    """
    if requested is not None:
        if requested not in ("native", "reference"):
            raise KernelError(f"backend={requested!r}: expected 'native', 'reference' or None")
        if requested == "native":
            native_module()
            _check_readable(tensors, dtypes)
        return requested
    if backend() != "native":
        return "reference"
    for t in tensors:
        if not native_can_read(t, dtypes):
            return "reference"
    return "native"


def would_be_native(*tensors: Tensor) -> bool:
    """Whether native code, of an op that takes all native dtypes, would compute with these, if they were not fake."""
    alike = len({t.dtype for t in tensors}) == 1
    return alike and all(t.device.type == "cpu" and t.dtype in NATIVE_DTYPES for t in tensors) and backend() == "native"


def _check_readable(tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    alike = len({t.dtype for t in tensors}) <= 1
    if not alike or not all(native_can_read(t, dtypes) for t in tensors):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        came = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise KernelError(
            f"backend='native': expected plain CPU tensors outside autograd, all {names}; got {came}."
            " Use torch.no_grad(), or backend='reference'"
        )


def native_can_read(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether a tensor is plain memory on the CPU that autograd and transforms need not follow."""
    return (
        tensor.dtype in dtypes
        and type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and not tensor.is_neg()
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001 (no public way to ask)
    )


@functools.cache
def _find_native() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("dpfast._native")
    except ModuleNotFoundError:
        return None, (
            "the native module was not built: dpfast was installed without a C++ compiler or the C headers "
            "of Python. Install both (Debian, Ubuntu: apt install g++ python3-dev), then reinstall dpfast"
        )
    except ImportError as error:
        return None, f"the native module cannot be loaded ({error}). Reinstall dpfast on this machine"
    abi = getattr(module, "abi", None)
    if abi != _ABI:
        return None, (
            f"the native module is of version {abi}, this dpfast expects {_ABI}. "
            "Build it again: pip install -e . (in the checkout), or reinstall dpfast"
        )
    return module, None
