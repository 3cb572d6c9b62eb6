"""``conv``: unfolded as Opacus does, vmapped, and the library's weight gradient."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, batches, factors, random, squares
from benchmarks.kernels.shapes import BATCHES, CONVS, Batch, Conv
from dpfast.kernels import conv

MOST_PAIRS = 1 << 20  # of positions of an example: beyond, no planner would think of a Gram


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    for layer, batch, dtype in batches(CONVS, of):
        yield from _cases(layer, batch, dtype)


def _cases(layer: Conv, batch: Batch, dtype: str) -> Iterator[Case]:
    shape = (layer.outputs, layer.inputs, layer.size, layer.size)
    spec = conv.ConvSpec.of(torch.empty(shape), stride=layer.stride, padding=layer.padding)
    b, w, space, backend = batch.examples, factors(batch.examples), layer.space // layer.stride, batch.backend
    terms = batch.augmult * layer.positions
    product = 2.0 * b * terms * layer.inputs * layer.size**2 * layer.outputs
    pixels = layer.inputs if layer.stride == 1 else layer.inputs * layer.size**2  # multiplied for a pair
    case = partial(
        Case,
        shape=f"{layer.name}, {batch.name}",
        dtype=dtype,
        inputs=lambda: random(
            (batch.rows, layer.inputs, layer.space, layer.space),
            (batch.rows, layer.outputs, space, space),
            channels_last=batch.channels_last,
        ),
        count=layer.count,
        work={
            "examples": b,
            "rows": terms,
            "inputs": layer.inputs * layer.size**2,
            "outputs": layer.outputs,
            "pixels": pixels,
            "taps": layer.size**2,
            "positions": layer.positions,
        },
        ordinary=lambda a, g: ordinary(a, g, layer),
    )
    grads = {
        "unfold + einsum": lambda a, g: by_unfolding(a, g, layer, b),
        "vmap": lambda a, g: by_vmap(a, g, layer, b),
    }
    norms = {name: lambda a, g, way=way: squares(way(a, g)) for name, way in grads.items()}

    yield case(
        op="conv.per_example_grads",
        ours=lambda a, g: conv.per_example_grads(a, g, spec, b, backend=backend),
        ways={name: lambda a, g, way=way: with_squares(way(a, g)) for name, way in grads.items()},
        flops=product,
    )
    yield case(
        op="conv.sq_norms",
        ours=lambda a, g: conv.sq_norms(a, g, spec, b, backend=backend),
        ways=norms,
        flops=product,
    )
    yield case(
        op="conv.clipped_sum",
        ours=lambda a, g: conv.clipped_sum(a, g, spec, w, backend=backend),
        ways={"scaled rows": lambda a, g: ordinary(a, scaled(g, w), layer)},
        flops=product,
    )
    if terms**2 <= MOST_PAIRS:
        yield case(
            op="conv.gram_sq_norms",
            ours=lambda a, g: conv.gram_sq_norms(a, g, spec, b, backend=backend),
            ways={**norms, "unfold + Gram": lambda a, g: by_gram(a, g, layer, b)},
            flops=1.0 * b * terms * (terms + 1) * (pixels + layer.outputs),
            bounded=True,
        )


def ordinary(a: Tensor, g: Tensor, layer: Conv) -> Tensor:
    """``[Cout, Cin, k, k]``: the weight gradient alone."""
    weight = torch.empty(layer.outputs, layer.inputs, layer.size, layer.size, dtype=a.dtype, device=a.device)
    two = [layer.stride] * 2, [layer.padding] * 2, [1] * 2
    mask = (False, True, False)
    return torch.ops.aten.convolution_backward(g, a, weight, None, *two, False, [0, 0], 1, mask)[1]


def by_unfolding(a: Tensor, g: Tensor, layer: Conv, examples: int) -> Tensor:
    patches, g = unfolded(a, g, layer, examples)
    return torch.einsum("bkpt,bkdt->bpd", g, patches).unflatten(2, (layer.inputs, layer.size, layer.size))


def unfolded(a: Tensor, g: Tensor, layer: Conv, examples: int) -> tuple[Tensor, Tensor]:
    """Patches ``[B, K, D, T]`` and ``g [B, K, P, T]``."""
    patches = F.unfold(a, layer.size, padding=layer.padding, stride=layer.stride)
    return patches.unflatten(0, (examples, -1)), g.flatten(2).unflatten(0, (examples, -1))


def by_vmap(a: Tensor, g: Tensor, layer: Conv, examples: int) -> Tensor:
    shape = (layer.outputs, layer.inputs, layer.size, layer.size)

    def gradient(a_i: Tensor, g_i: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(a_i, shape, g_i, layer.stride, layer.padding)

    return torch.func.vmap(gradient)(a.unflatten(0, (examples, -1)), g.unflatten(0, (examples, -1)))


def by_gram(a: Tensor, g: Tensor, layer: Conv, examples: int) -> Tensor:
    patches, g = (t.movedim(1, 2).flatten(2) for t in unfolded(a, g, layer, examples))
    return ((patches.mT @ patches) * (g.mT @ g)).sum((1, 2))


def with_squares(grads: Tensor) -> tuple[Tensor, Tensor]:
    return grads, squares(grads)


def scaled(g: Tensor, w: Tensor) -> Tensor:
    """``w_i g_i`` of every row of example i."""
    return g * w.to(g.dtype).repeat_interleave(len(g) // len(w)).view(-1, 1, 1, 1)
