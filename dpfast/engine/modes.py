"""Torch-function modes that stay on between two calls of the user's code.

A mode that is left on top of the stack is what the end of ``with torch.device(...)`` or the like takes off by mistake.
So these lie at the bottom, above the mode of ``torch.set_default_device`` alone, which insists on being lowest.
"""

import weakref

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

# Of sessions that are gone. Garbage is collected at any time, also while torch is about to call the modes on its stack,
# when nothing may be taken off; they do nothing more, and go with the next change of the stack.
_DEAD: weakref.WeakSet[TorchFunctionMode] = weakref.WeakSet()


def leave_to_sweep(mode: TorchFunctionMode) -> None:
    """``mode`` has nobody to work for any more."""
    _DEAD.add(mode)


def sweep() -> None:
    """Take those off that have nobody to work for."""
    if _DEAD:
        _restack([mode for mode in _get_current_function_mode_stack() if mode not in _DEAD])


def insert(mode: TorchFunctionMode) -> None:
    """Put ``mode`` under all others, unless it is there."""
    sweep()
    stack = _get_current_function_mode_stack()
    if not any(other is mode for other in stack):
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)  # it has no other name
        lowest = 1 if default is not None and stack and stack[0] is default else 0
        _restack([*stack[:lowest], mode, *stack[lowest:]])


def remove(mode: TorchFunctionMode) -> None:
    """Take ``mode`` out of the stack, wherever it is."""
    stack = _get_current_function_mode_stack()
    if any(other is mode for other in stack):
        _restack([other for other in stack if other is not mode])


def _restack(modes: list[TorchFunctionMode]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
