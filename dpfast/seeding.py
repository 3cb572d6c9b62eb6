"""The generators that a whole process shares (dropout reads them), without touching anybody else's random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, the generators of torch (the CPU's and that of ``device``), numpy and Python start from ``seed``;
    afterwards they are as they were.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    python, shared = random.getstate(), np.random.get_state()  # noqa: NPY002  # the one generator that all share
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF])  # noqa: NPY002
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(shared)  # noqa: NPY002


def reseed(entropy: bytes) -> None:
    """Have the generators that a whole process shares (torch's, numpy's and Python's) go on from ``entropy``, of 72
    bytes.
    """
    torch.manual_seed(int.from_bytes(entropy[:8], "big", signed=True))
    random.seed(entropy[8:40])
    np.random.seed(np.frombuffer(entropy[40:72], np.uint32))  # noqa: NPY002


class RandomState:
    """Of torch, Python and numpy, now; ``restore`` goes back to it."""

    def __init__(self) -> None:
        self.cpu, self.python = torch.get_rng_state(), random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002  # of the one generator that all share
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def has_moved(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomState()
        numpy = zip(self.numpy, now.numpy, strict=True)
        return not (
            torch.equal(self.cpu, now.cpu)
            and self.python == now.python
            and all(np.array_equal(before, after) for before, after in numpy)
            and all(map(torch.equal, self.cuda, now.cuda))
        )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
