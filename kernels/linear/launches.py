"""How the Gram kernels of ``linear.triton`` and ``conv.triton_gram`` are launched; no Triton is needed to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GramLaunch:
    """``m`` rows of a tile, ``k`` features at a time."""

    m: int = 64
    k: int = 64
    warps: int = 4
    stages: int = 3


GRAMS = {  # of half precision or float32, of strides that 16 divides or any: what takes more registers takes less
    (True, True): GramLaunch(),
    (True, False): GramLaunch(k=32, warps=8),
    (False, True): GramLaunch(k=16, warps=8),
    (False, False): GramLaunch(m=32, k=16),
}
