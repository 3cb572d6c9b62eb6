"""``clip``: gradients that are stored, always in float32. A non-private step has nothing in their place."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, batches, factors, random, squares
from benchmarks.kernels.shapes import BATCHES, CONVS, Batch
from dpfast.kernels import clip
from dpfast.kernels.dispatch import Backend


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    seen = set()
    for layer, batch, _ in batches(CONVS, of):
        size = (batch.examples, layer.outputs, layer.inputs, layer.size, layer.size)
        if size in seen:  # K has been summed over
            continue
        seen.add(size)
        shape = f"{layer.outputs}x{layer.inputs}x{layer.size}x{layer.size}, B={batch.examples}"
        case = partial(Case, shape=shape, dtype="float32", inputs=partial(random, size), count=layer.count)
        yield case(
            op="clip.sq_norms", ours=partial(clip.sq_norms, backend=batch.backend), ways={"square, sum": squares}
        )
        yield case(op="clip.clipped_sum", **sums(factors(batch.examples), batch.backend))


def sums(w: Tensor, backend: Backend | None) -> dict[str, object]:
    return {
        "ours": lambda grads: clip.clipped_sum(grads, w, backend=backend),
        "ways": {"tensordot": lambda grads: torch.tensordot(w.to(grads.dtype), grads, 1)},
    }
