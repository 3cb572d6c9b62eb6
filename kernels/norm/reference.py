"""The formula of ``norm`` in PyTorch: any floating dtype, any device."""

import torch.nn.functional as F
from torch import Tensor

from dpfast.kernels.affine.reference import affine_grads
from dpfast.kernels.precision import accumulation_dtype


def group_norm_grads(x: Tensor, g: Tensor, groups: int, eps: float, examples: int) -> tuple[Tensor, Tensor]:
    """``weight = sum x_hat * g``, ``bias = sum g``; [N, C, *space] -> two of [B, C]."""
    dtype = accumulation_dtype(x, g)
    # torch's kernel for channels_last finds the variance in one pass of float32: 4e-3 off where the mean is 100.
    normalised = F.group_norm(x.to(dtype).contiguous(), groups, eps=eps)

    def split(t: Tensor) -> Tensor:
        rows = t.unflatten(0, (examples, t.shape[0] // max(1, examples)))
        return rows.flatten(3) if rows.ndim > 3 else rows.unsqueeze(3)

    return affine_grads(split(normalised), split(g.to(dtype)))
