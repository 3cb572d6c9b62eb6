"""``keyed`` on the CPU: ``csrc/cpu/keyed.cpp``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.kernels.dispatch import native_module


def fill(out: Tensor, ids: Tensor, rows: int, first: int, step: int, key: Sequence[int], normal: bool) -> None:
    """``out [B * rows, count]``."""
    sizes = (len(ids), rows, out.shape[1])
    native_module().keyed(out.data_ptr(), ids.data_ptr(), sizes, first, step, key, normal, torch.get_num_threads())
