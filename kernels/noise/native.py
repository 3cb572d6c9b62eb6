"""``noise`` on the CPU: ``csrc/cpu/noise.cpp``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.kernels.dispatch import native_module

_DTYPES = {torch.float32: 0, torch.float64: 2}  # Dtype of csrc/dpfast.h


def noised(x: Tensor, out: Tensor, scale: float, divisor: float, grid: float, key: Sequence[int]) -> None:
    """Into ``out``, which lies in memory as ``x`` does, without gaps."""
    numbers, threads = (scale, divisor, grid), torch.get_num_threads()
    native_module().noised(x.data_ptr(), out.data_ptr(), x.numel(), _DTYPES[x.dtype], numbers, key, threads)
