"""``norm``: normalise, then product and sum; torch's backward pass is given the mean and deviation of the forward."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import affine
from benchmarks.kernels.case import Case, batches, random
from benchmarks.kernels.shapes import BATCHES, GROUP_NORMS, Batch, GroupNorm
from dpfast.kernels import norm

NORM_EPS = 1e-5


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    for layer, batch, dtype in batches(GROUP_NORMS, of):
        yield from _cases(layer, batch, dtype)


def _cases(layer: GroupNorm, batch: Batch, dtype: str) -> Iterator[Case]:
    b, backend = batch.examples, batch.backend
    size = (batch.rows, layer.channels, layer.space, layer.space)
    case = partial(
        Case,
        shape=f"{layer.name}, {batch.name}",
        dtype=dtype,
        inputs=lambda: inputs(size, layer, channels_last=batch.channels_last),
        count=layer.count,
    )

    def by_normalising(x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x_hat = F.group_norm(x, layer.groups, eps=NORM_EPS)
        return affine.summed(*(t.unflatten(0, (b, -1)).flatten(3) for t in (x_hat, g)))

    def both(x: Tensor, g: Tensor, weight: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        return backward(x, g, weight, *saved, layer=layer, wanted=(True, False, False))[0], *by_normalising(x, g)

    yield case(
        op="norm.group_norm_grads",
        ours=lambda x, g, *_: norm.group_norm_grads(x, g, layer.groups, NORM_EPS, b, backend=backend),
        ways={"group_norm, product, sum": by_normalising},
        ordinary=lambda *given: backward(*given, layer=layer, wanted=(False, True, True)),
    )
    yield case(
        op="norm.group_norm_backward",
        ours=lambda x, g, weight, *_: norm.group_norm_backward(
            x, g, weight.float(), layer.groups, NORM_EPS, b, backend=backend
        ),
        ways={"its backward, group_norm, product, sum": both},
        ordinary=lambda *given: backward(*given, layer=layer, wanted=(True, True, True)),
    )


def inputs(size: tuple[int, ...], layer: GroupNorm, *, channels_last: bool = False) -> tuple[Tensor, ...]:
    """x, g, the norm's weight, mean and deviation."""
    x, g, weight = random(size, size, (layer.channels,), channels_last=channels_last)
    shape = (*size[:2], layer.space**2, layer.groups)
    _, mean, deviation = torch.native_group_norm(x.contiguous(), None, None, *shape, NORM_EPS)
    return x, g, weight, mean, deviation


def backward(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    mean: Tensor,
    deviation: Tensor,
    *,
    layer: GroupNorm,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """torch's, with those of the gradients of x, weight and bias that are wanted."""
    size = (len(x), layer.channels, layer.space**2, layer.groups)
    if x.device.type == "cuda":  # its kernel reads contiguous memory only: autograd, too, copies what lies otherwise
        x, g = x.contiguous(), g.contiguous()
    found = torch.ops.aten.native_group_norm_backward(g, x, mean, deviation, weight, *size, list(wanted))
    return tuple(grad for grad, is_wanted in zip(found, wanted, strict=True) if is_wanted)
