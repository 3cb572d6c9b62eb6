"""``clip`` on the CPU in float32: ``csrc/cpu/clip.cpp``, one pass over memory each."""

import torch
from torch import Tensor

from dpfast.kernels.dispatch import native_module


def sq_norms(flat: Tensor) -> Tensor:
    """``|G_i|^2 [B]``, float64, of ``[B, n]`` whose rows lie dense in memory."""
    native, (examples, numbers) = native_module(), flat.shape
    sq = flat.new_empty(examples, dtype=torch.float64)
    parts = flat.new_empty(examples * native.square_blocks(numbers), dtype=torch.float64)
    native.sq_norms(
        flat.data_ptr(), examples, numbers, flat.stride(0), parts.data_ptr(), sq.data_ptr(), torch.get_num_threads()
    )
    return sq


def clipped_sum(flat: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [n]`` of such rows; one with ``w_i = 0`` is not looked at."""
    weights, out = w.to(torch.float32).contiguous(), flat.new_empty(flat.shape[1])
    native_module().clipped_sum(
        flat.data_ptr(), *flat.shape, flat.stride(0), weights.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out
