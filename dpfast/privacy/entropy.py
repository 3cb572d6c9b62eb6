"""The one source of private randomness: the operating system. No seed reaches it.

Guarantee: every sampling decision is made of fresh bytes of ``os.urandom``, every tensor of noise of the ChaCha20
stream of a fresh key of 32 such bytes, which is used once and written nowhere; nothing (a recipe, a checkpoint,
torch's or numpy's global generators) can repeat or predict them. Tests replace the source with
``dpfast.testing.injected_entropy``, and everything written meanwhile carries ``TEST_ENTROPY``.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import

from dpfast.errors import PrivacyError
from dpfast.kernels import noise

TEST_ENTROPY = "TEST ENTROPY: no guarantee"

# Replaced by ``dpfast.testing`` and by nobody else.
source: Callable[[int], bytes] = os.urandom


def is_injected() -> bool:
    """True while ``dpfast.testing.injected_entropy`` replaces the operating system."""
    return source is not os.urandom


def random_bytes(count: int) -> bytes:
    """``count`` unpredictable bytes."""
    return source(count)


def uniform(count: int) -> NDArray[np.float64]:
    """``count`` float64 numbers k / 2^53, k uniform on 0 .. 2^53 - 1: 1 - u is exact and never 0."""
    words = np.frombuffer(random_bytes(8 * count), dtype=np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@_disable_dynamo  # a compiled caller would check, keep and perhaps print the key that it was compiled with
def noised(values: Tensor, scale: float, divisor: float, *, grid: float = 0.0) -> Tensor:
    """``(values + scale * N(0, I)) / divisor`` with fresh noise: a new tensor of the same shape, dtype and device.

    Calculated in float64 (``dpfast.kernels.noise``). Draws beyond 8.49 standard deviations, which a true normal
    produces with probability below 2^-52, do not occur. grid: a power of two, to multiples of which values and noise
    are rounded before they are added; without, the attacks on floating-point noise of Mironov (2012) are not excluded.

    Raises:
        PrivacyError: what calls it would use the noise twice: a transform of ``torch.func``, a trace, a CUDA graph.
    """
    if is_functorch_wrapped_tensor(values) or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) or _is_captured(values):
        raise PrivacyError(
            "noise was asked for by a transform of torch.func, a trace or a CUDA graph, which would use it more than"
            " once: call the optimizer's step outside of it"
        )
    return noise.noised(values, scale, divisor, random_bytes(noise.KEY_BYTES), grid=grid)


def _is_captured(values: Tensor) -> bool:
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def standard_normal(shape: Sequence[int]) -> Tensor:
    """Independent N(0, 1) draws, float64 on the CPU, of the given shape."""
    return noised(torch.zeros(tuple(shape), dtype=torch.float64, device="cpu"), 1.0, 1.0)
