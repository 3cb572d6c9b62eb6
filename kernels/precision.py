"""The dtype in which per-example quantities are accumulated."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: half precision is never summed in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
