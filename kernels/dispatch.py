"""Which implementation of an op runs: ``dpfast._native`` on the CPU, Triton on a GPU, or PyTorch (``reference``).

The environment and what is installed are looked at once, at the first op, not at import. ``DPFAST_BACKEND=reference``
leaves kernels aside, ``native`` or ``triton`` makes the absence of these an error and leaves the other aside, ``auto``
(or nothing) takes what is there.
"""

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dpfast.errors import ConfigError, DPFastError

Backend = Literal["native", "triton", "reference"]

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype of csrc/dpfast.h
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ABI = 8  # kAbi of csrc/dpfast.h
_VARIABLE = "DPFAST_BACKEND"
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types with no behaviour of their own: no fake or other subclass


class KernelError(DPFastError, ValueError):
    """An op was called with shapes, dtypes or a backend it cannot compute with."""


def expect(op: str, problems: Sequence[str], **given: Tensor) -> None:
    """Refuse a call, with every problem and what came.

    Raises:
        KernelError: there are problems.
    """
    if problems:
        came = [f"{name} {list(t.shape)} {t.dtype} on {t.device}" for name, t in given.items()]
        raise KernelError(f"{op}: {'; '.join(problems)}; got {', '.join(came)}")


def backend() -> Backend:
    """What computes on the CPU, as the environment said when it was first asked for.

    Raises:
        ConfigError: ``DPFAST_BACKEND`` is none of native, triton, reference, auto, or names what is missing.
    """
    return "native" if "native" in _allowed() else "reference"


@functools.cache
def _allowed() -> frozenset[Backend]:
    """The backends that ops choose between by themselves."""
    wanted = os.environ.get(_VARIABLE) or "auto"
    names = get_args(Backend)
    if wanted not in (*names, "auto"):
        raise ConfigError(f"{_VARIABLE}={wanted!r}: expected {', '.join(names)} or auto")
    missing: dict[str, str | None] = {"native": why_not_native(), "triton": why_not_triton(), "reference": None}
    if wanted != "auto" and missing[wanted]:
        raise ConfigError(f"{_VARIABLE}={wanted}, but {missing[wanted]}")
    if not torch.cuda.is_available():
        missing["triton"] = "its interpreter has to be asked for by name"
    return frozenset(
        name for name in names if name in (wanted, "reference") or (wanted == "auto" and not missing[name])
    )


def is_allowed(name: Backend) -> bool:
    """Whether ops may choose a backend by themselves."""
    return name in _allowed()


def why_not_native() -> str | None:
    """Why the native module is not used, in words for a person; None when it is used."""
    if os.environ.get(_VARIABLE) in ("reference", "triton"):
        return f"{_VARIABLE}={os.environ[_VARIABLE]} asks for something else"
    return _find_native()[1]


@functools.cache
def why_not_triton() -> str | None:
    """Why Triton is not used, in words for a person; None when it is used."""
    if os.environ.get(_VARIABLE) in ("reference", "native"):
        return f"{_VARIABLE}={os.environ[_VARIABLE]} asks for something else"
    if not torch.cuda.is_available() and not is_interpreting():
        return "torch sees no GPU (to try kernels on the CPU, slowly: TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None if is_interpreting() else _why_not_this_gpu()


def _why_not_this_gpu() -> str | None:
    if torch.version.hip:
        return "the kernels are for GPUs of NVIDIA, and torch was built for ROCm"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}, and the kernels need 8.0 (Ampere)"
    if not os.environ.get("CC") and not any(map(shutil.which, ("clang", "gcc", "cc"))):
        return "Triton needs a C compiler to launch kernels (Debian, Ubuntu: apt install gcc)"
    return None


def is_interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def native_module() -> ModuleType:
    """The module ``dpfast._native``.

    Raises:
        KernelError: it is missing or was built from other sources; the message says which.
    """
    module, reason = _find_native()
    if module is None:
        raise KernelError(f"backend 'native' was asked for, but {reason}")
    return module


def choose(
    requested: Backend | None,
    *tensors: Tensor,
    native: Collection[torch.dtype] = (),
    triton: Collection[torch.dtype] = (),
) -> Backend:
    """The backend for these tensors: ``requested``, or one that can read them all.

    native, triton: the dtypes that the op's kernels take.
    """
    if requested is not None:
        if requested not in get_args(Backend):
            raise KernelError(f"backend={requested!r}: expected 'native', 'triton', 'reference' or None")
        if requested == "native":
            native_module()
            _check_readable(requested, tensors, native)
        elif requested == "triton":
            if reason := why_not_triton():
                raise KernelError(f"backend 'triton' was asked for, but {reason}")
            _check_readable(requested, tensors, triton)
        return requested
    for name, dtypes in (("native", native), ("triton", triton)):
        if dtypes and name in _allowed() and all(can_read(name, t, dtypes) for t in tensors) and _together(tensors):
            return name
    return "reference"


@contextmanager
def planned_for(name: Backend | None) -> Iterator[None]:
    """Inside, ``expected`` answers for a device where this backend computes; None: for this one."""
    before = _planned.set(name)
    try:
        yield
    finally:
        _planned.reset(before)


_planned: ContextVar[Backend | None] = ContextVar("planned", default=None)


def expected(*tensors: Tensor, native: Collection[torch.dtype] = (), triton: Collection[torch.dtype] = ()) -> Backend:
    """What ``choose`` would take for tensors like these, of one dtype: they may be fake."""
    kernels: dict[Backend, Collection[torch.dtype]] = {"native": native, "triton": triton}
    planned, found = _planned.get(), {t.dtype for t in tensors}
    for name, dtypes in kernels.items():
        is_there = is_allowed(name) and all(_lies_there(name, t) for t in tensors)
        if (is_there if planned is None else planned == name) and len(found) == 1 and found <= set(dtypes):
            return name
    return "reference"


@functools.cache
def implementation(op: str, name: str) -> Any:
    """The module of the op in a folder ``op``: read when it is first asked for, because of what it needs."""
    return importlib.import_module(f"{op}.{name}")


def _check_readable(name: Backend, tensors: Sequence[Tensor], dtypes: Collection[torch.dtype]) -> None:
    if not dtypes:
        raise KernelError(f"backend={name!r}: this op has no {name} kernel. Use backend='reference', or None")
    alike = len({t.dtype for t in tensors}) <= 1 and _together(tensors)
    if not alike or not all(can_read(name, t, dtypes) for t in tensors):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        came = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        where = "CPU" if name == "native" else "GPU"
        cure = (
            "Use torch.no_grad(), or backend='reference'" if alike else "Cast one of them, or use backend='reference'"
        )
        raise KernelError(
            f"backend={name!r}: expected plain {where} tensors outside autograd, all {names}; got {came}. {cure}"
        )


def can_read(name: Backend, tensor: Tensor, dtypes: Collection[torch.dtype]) -> bool:
    """Whether a tensor is plain memory where the backend computes, which autograd and transforms need not follow."""
    return (
        tensor.dtype in dtypes
        and type(tensor) in PLAIN
        and _lies_there(name, tensor)
        and tensor.layout == torch.strided
        and not tensor.is_neg()
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001 (no public way to ask)
    )


def _together(tensors: Sequence[Tensor]) -> bool:
    return len({t.device for t in tensors}) <= 1


def _lies_there(name: Backend, tensor: Tensor) -> bool:
    return tensor.device.type == ("cpu" if name == "native" else "cuda") or (name == "triton" and is_interpreting())


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
