"""``affine`` on the CPU, one pass over a and g in ``csrc/cpu/affine.cpp``: float32, and biases from bfloat16, too."""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import NATIVE_DTYPES, KernelError, native_can_read, native_module


def affine_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, [B, M, C, S] -> two of [B, C]; sums are carried in float64 and rounded once.

    Raises:
        KernelError: the native module is missing, or a or g is not plain float32 memory on the CPU.
    """
    if not (native_can_read(a) and native_can_read(g)):
        raise KernelError(
            "affine_grads(backend='native'): expected plain float32 CPU tensors outside autograd; "
            f"got {a.dtype} and {g.dtype} on {a.device}. Use torch.no_grad(), or backend='reference'"
        )
    weight = torch.empty(a.shape[0], a.shape[2], dtype=a.dtype, device=a.device)
    bias = torch.empty(a.shape[0], a.shape[2], dtype=a.dtype, device=a.device)
    native_module().affine_grads(
        a.data_ptr(), a.stride(), g.data_ptr(), g.stride(), tuple(a.shape),
        weight.data_ptr(), bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias


def bias_grads(g: Tensor) -> Tensor:
    """``sum_{m,s} g``; [B, M, C, S] -> [B, C]. Few floats at a time are added up before they go into a double."""
    if not native_can_read(g, tuple(NATIVE_DTYPES)):
        raise KernelError(
            "bias_grads(backend='native'): expected a plain float32 or bfloat16 CPU tensor outside autograd; "
            f"got {g.dtype} on {g.device}. Use torch.no_grad(), or backend='reference'"
        )
    bias = torch.empty(g.shape[0], g.shape[2], dtype=torch.float32, device=g.device)
    native_module().bias_grads(
        g.data_ptr(), g.stride(), tuple(g.shape), NATIVE_DTYPES[g.dtype], bias.data_ptr(), torch.get_num_threads()
    )
    return bias
