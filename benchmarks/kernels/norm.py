"""``norm``: normalise, then product and sum; the ordinary backward is given the mean and deviation of the forward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import affine
from benchmarks.kernels.case import Case, batches, random
from benchmarks.kernels.shapes import GROUP_NORMS, Batch, GroupNorm
from dpfast.kernels import norm

NORM_EPS = 1e-5


def cases() -> Iterator[Case]:
    for layer, batch, dtype in batches(GROUP_NORMS):
        yield _case(layer, batch, dtype)


def _case(layer: GroupNorm, batch: Batch, dtype: str) -> Case:
    b = batch.examples
    size = (batch.rows, layer.channels, layer.space, layer.space)

    def inputs() -> tuple[Tensor, ...]:
        x, g = random(size, size)
        saved = torch.native_group_norm(x, None, None, *size[:2], layer.space**2, layer.groups, NORM_EPS)[1:]
        return x, g, *saved

    def by_normalising(x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x_hat = F.group_norm(x, layer.groups, eps=NORM_EPS)
        return affine.summed(*(t.unflatten(0, (b, -1)).flatten(3) for t in (x_hat, g)))

    return Case(
        op="norm.group_norm_grads",
        shape=f"{layer.name}, {batch.name}",
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, g, *_: norm.group_norm_grads(x, g, layer.groups, NORM_EPS, b),
        ways={"group_norm, product, sum": by_normalising},
        ordinary=lambda *given: ordinary(*given, layer),
    )


def ordinary(x: Tensor, g: Tensor, mean: Tensor, deviation: Tensor, layer: GroupNorm) -> tuple[Tensor, Tensor]:
    weight = x.new_ones(layer.channels)  # does not enter; without it torch takes no bfloat16
    size = (len(x), layer.channels, layer.space**2, layer.groups)
    found = torch.ops.aten.native_group_norm_backward(g, x, mean, deviation, weight, *size, [False, True, True])
    return found[1], found[2]
