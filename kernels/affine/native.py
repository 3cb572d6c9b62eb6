"""``affine`` on the CPU, one pass over a and g in ``csrc/cpu/affine.cpp``: float32, and biases from bfloat16, too."""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, native_module


def affine_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, [B, M, C, S] -> two of [B, C]; sums are carried in float64 and rounded once."""
    weight = torch.empty(a.shape[0], a.shape[2], dtype=a.dtype, device=a.device)
    bias = torch.empty(a.shape[0], a.shape[2], dtype=a.dtype, device=a.device)
    native_module().affine_grads(
        a.data_ptr(), a.stride(), g.data_ptr(), g.stride(), tuple(a.shape),
        weight.data_ptr(), bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias


def bias_grads(g: Tensor) -> Tensor:
    """``sum_{m,s} g``; [B, M, C, S] -> [B, C]. Few floats at a time are added up before they go into a double."""
    bias = torch.empty(g.shape[0], g.shape[2], dtype=torch.float32, device=g.device)
    native_module().bias_grads(
        g.data_ptr(), g.stride(), tuple(g.shape), NATIVE_DTYPES[g.dtype], bias.data_ptr(), torch.get_num_threads()
    )
    return bias
