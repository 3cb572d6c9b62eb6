"""``noise``: once a step, for each tensor of parameters. The ordinary way is torch, with its own generator."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.kernels.case import Case, batches, random
from benchmarks.kernels.shapes import BATCHES, CONVS, Batch
from dpfast.kernels.noise import noised

KEY = bytes(range(32))


def cases(of: Sequence[Batch] = BATCHES) -> Iterator[Case]:
    seen = set()
    for layer, batch, _ in batches(CONVS, of):
        size = (layer.outputs, layer.inputs, layer.size, layer.size)
        if size in seen:
            continue
        seen.add(size)
        yield Case(
            op="noise.noised",
            shape="x".join(map(str, size)) + ", once",
            dtype="float32",
            inputs=partial(random, size),
            ours=lambda x, backend=batch.backend: noised(x, 1.5, 20.0, KEY, backend=backend),
            ways={"numpy": lambda x: noised(x, 1.5, 20.0, KEY, backend="reference")},
            ordinary=lambda x: (x + 1.5 * torch.randn_like(x)) / 20.0,
            count=layer.count,
        )
