"""``clip`` on the CPU in float32: ``csrc/cpu/clip.cpp``, one pass over memory each."""

from collections.abc import Sequence

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


def clipped_sums(flats: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """``sum_i w_i G_i [n]`` of each of some such ``[B, n]``; an example with ``w_i = 0`` is not looked at."""
    weights = w.to(torch.float32).contiguous()
    sums = [flat.new_empty(flat.shape[1]) for flat in flats]
    places = [(f.data_ptr(), f.shape[1], f.stride(0), out.data_ptr()) for f, out in zip(flats, sums, strict=True)]
    native_module().clipped_sums(places, len(weights), weights.data_ptr(), torch.get_num_threads())
    return sums
