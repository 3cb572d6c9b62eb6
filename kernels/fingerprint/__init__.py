"""Numbers by which a change of a tensor shows, however it was made: in place, through ``.data``, through numpy.

One number per tensor; equal memory gives equal numbers, a change nearly always another one. Reads every tensor once,
with one transfer per device.
"""

from collections.abc import Sequence

from torch import Tensor

from dpfast.kernels.dispatch import backend
from dpfast.kernels.fingerprint import native, reference


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor, any dtype, layout and device."""
    use_native = backend() == "native"
    on_cpu = [i for i, t in enumerate(tensors) if use_native and native.can_read(t)]
    others = sorted(set(range(len(tensors))) - set(on_cpu))
    found = dict(zip(on_cpu, native.fingerprints([tensors[i] for i in on_cpu]), strict=True)) if on_cpu else {}
    found |= dict(zip(others, reference.fingerprints([tensors[i] for i in others]), strict=True))
    return [found[i] for i in range(len(tensors))]
