"""``norm`` on the CPU, in float32 or from bfloat16: one read of x and g in ``csrc/cpu/norm.cpp``."""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, native_module


def group_norm_grads(x: Tensor, g: Tensor, groups: int, eps: float, examples: int) -> tuple[Tensor, Tensor]:
    """As the reference; sums are carried in float64 and rounded once."""
    x, g = _flat(x), _flat(g)
    rows, channels, positions = x.shape
    weight = x.new_empty(examples, channels, dtype=torch.float32)
    bias = torch.empty_like(weight)
    native_module().group_norm_grads(
        x.data_ptr(), x.stride(), g.data_ptr(), g.stride(),
        (examples, rows // max(1, examples), groups, channels, positions), eps, NATIVE_DTYPES[x.dtype],
        weight.data_ptr(), bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias


def _flat(t: Tensor) -> Tensor:
    """``[N, C, S]``; a view wherever positions are evenly spaced (contiguous, channels_last)."""
    return t.flatten(2) if t.ndim > 2 else t.unsqueeze(2)
