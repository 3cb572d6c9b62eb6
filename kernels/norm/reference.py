"""The formula of ``norm`` in PyTorch: any floating dtype, any device."""

import math

import torch.nn.functional as F
from torch import Tensor

from dpfast.kernels.affine.reference import affine_grads
from dpfast.kernels.precision import accumulation_dtype


def group_norm_grads(x: Tensor, g: Tensor, groups: int, eps: float, examples: int) -> tuple[Tensor, Tensor]:
    """``weight = sum x_hat * g``, ``bias = sum g``; [N, C, S] -> two of [B, C]."""
    dtype = accumulation_dtype(x, g)
    normalised = _normalised(x.to(dtype), groups, eps)

    def split(t: Tensor) -> Tensor:
        return t.unflatten(0, (examples, t.shape[0] // max(1, examples)))

    return affine_grads(split(normalised), split(g.to(dtype)))


def group_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor | None, groups: int, eps: float, examples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``h = weight * g``: ``dx = (h - mean(h) - x_hat * mean(h * x_hat)) / sqrt(var + eps)``, means of a group."""
    dtype = accumulation_dtype(x, g)
    h = g.to(dtype)
    if weight is not None:
        h = h * weight.to(dtype).view(-1, 1)
    wide = x.to(dtype)
    of_group = (len(x), groups, math.prod(x.shape[1:]) // groups)
    h, x_hat, of_x = (t.reshape(of_group) for t in (h, _normalised(wide, groups, eps), wide))
    scale = ((of_x - of_x.mean(2, keepdim=True)).square().mean(2, keepdim=True) + eps).rsqrt()
    dx = (h - h.mean(2, keepdim=True) - x_hat * (h * x_hat).mean(2, keepdim=True)) * scale
    return dx.view(x.shape).to(x.dtype), *group_norm_grads(x, g, groups, eps, examples)


def _normalised(x: Tensor, groups: int, eps: float) -> Tensor:
    # torch's kernel for channels_last finds the variance in one pass of float32: 4e-3 off where the mean is 100.
    return F.group_norm(x.contiguous(), groups, eps=eps) if x.numel() else x
