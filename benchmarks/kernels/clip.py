"""``clip``: gradients that are stored, always in float32. A non-private step has nothing in their place."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, batches, factors, random, squares
from benchmarks.kernels.shapes import CONVS
from dpfast.kernels import clip


def cases() -> Iterator[Case]:
    seen = set()
    for layer, batch, dtype in batches(CONVS):
        size = (batch.examples, layer.outputs, layer.inputs, layer.size, layer.size)
        if dtype != "float32" or size in seen:  # K has been summed over
            continue
        seen.add(size)
        shape = f"{layer.outputs}x{layer.inputs}x{layer.size}x{layer.size}, B={batch.examples}"
        case = partial(Case, shape=shape, dtype=dtype, inputs=partial(random, size))
        yield case(op="clip.sq_norms", ours=clip.sq_norms, ways={"square, sum": squares})
        yield case(op="clip.clipped_sum", **sums(factors(batch.examples)))


def sums(w: Tensor) -> dict[str, object]:
    return {
        "ours": lambda grads: clip.clipped_sum(grads, w),
        "ways": {"tensordot": lambda grads: torch.tensordot(w.to(grads.dtype), grads, 1)},
    }
