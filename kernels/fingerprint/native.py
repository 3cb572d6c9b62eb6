"""``fingerprint`` of dense memory on the CPU: ``csrc/cpu/fingerprint.cpp``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.kernels.dispatch import PLAIN, native_module


def can_read(t: Tensor) -> bool:
    """Whether a tensor's numbers fill one piece of memory, in whatever order."""
    return (
        type(t) in PLAIN
        and t.is_cpu
        and t.layout == torch.strided
        and not t.is_neg()
        and not t.is_conj()
        and (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t))
    )


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor that ``can_read`` accepts."""
    memory = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    found: list[int] = native_module().fingerprints(memory, torch.get_num_threads())
    return found
