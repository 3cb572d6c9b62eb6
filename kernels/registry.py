"""Ops under ``torch.ops.dpfast``: what fake tensors, tracing and compilation need to know of a kernel.

An op has a schema, an implementation that may look at the numbers (and at what the tensors are) to choose a backend,
and a *fake* that gives only shapes and dtypes. Ops work on values: they have no gradients of their own.
"""

from collections.abc import Callable
from typing import Any

import torch

from dpfast.kernels.dispatch import PLAIN

Bytes = Callable[..., int]

_LIBRARY = torch.library.Library("dpfast", "DEF")
_SCRATCH: dict[str, Bytes] = {}


def scratch_bytes(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> int:
    """Of the tensors that a call makes and lets go, as far as they are worth counting."""
    count = _SCRATCH.get(op.name().removeprefix("dpfast::").removesuffix(".default"))
    return 0 if count is None else count(*args)


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], scratch: Bytes | None = None
) -> Callable[..., Any]:
    """Define ``dpfast::name(...)`` and return a function that calls it.

    run, fake: take the arguments of ``schema`` in order and return its results, new tensors that share no memory with
    the arguments. scratch: bytes that a call holds meanwhile. Plain tensors (by the first) go to ``run`` without
    torch's dispatcher, which costs 45 us a call; what has to be seen by others (fake tensors, a trace) goes
    through it.
    """
    name, _, _ = schema.partition("(")

    if scratch is not None:
        _SCRATCH[name] = scratch

    def on_values(*args: Any) -> Any:
        first = args[0][0] if type(args[0]) is list else args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current one
                return on_values(*args)
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_values, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dpfast::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.dpfast, name).default

    def call(*args: Any) -> Any:
        first = args[0][0] if type(args[0]) is list else args[0]
        if torch.compiler.is_compiling():
            return op(*args)
        if type(first) in PLAIN and not torch._C._len_torch_dispatch_stack():
            return on_values(*args)
        return op(*args)

    return call
