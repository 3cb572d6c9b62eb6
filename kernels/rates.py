"""How fast a device is: this machine, measured once and cached, or a GPU that need not be here."""

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dpfast.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """product, brain: FLOP/s of per-example weight gradients from float32, from bfloat16; gemm, gemm_brain: of Grams
    and other batched matrix products; shift: products per second of shifted sums over Grams; store, load: seconds to
    write, to read a byte; call, op: seconds to call an op of dpfast, of torch; library, library_brain: FLOP/s of an
    ordinary step's convolutions and linear maps.

    Of a GPU, 0 elsewhere: processors, between which tiles of a product are shared out; gap: seconds between kernels,
    which run while Python calls the next; memory: bytes.
    """

    product: float
    brain: float
    gemm: float
    shift: float
    store: float
    load: float
    call: float
    op: float
    library: float
    library_brain: float
    gemm_brain: float
    processors: int = 0
    gap: float = 0.0
    memory: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether calls and kernels overlap."""
        return self.processors > 0


# Two cores of a Zen 3 server, native kernels.
USUAL = Rates(
    product=130e9,
    brain=130e9,
    gemm=110e9,
    shift=4e9,
    store=2.5e-10,
    load=8e-11,
    call=3e-5,
    op=1e-5,
    library=130e9,
    library_brain=130e9,
    gemm_brain=110e9,
)

# Assumed, not measured. Of 989 TFLOP/s in bfloat16 and 4.8 TB/s by the data sheet, 600 and 4 for libraries; 90% of that
# for our products, less what ``conv.launches`` says. float32: TF32 for the ordinary step (torch allows it in
# convolutions), three products of TF32 for ours. A shifted sum reads four bytes for a product, half from the L2 cache.
H200 = Rates(
    product=90e12,
    brain=540e12,
    gemm=90e12,
    gemm_brain=540e12,
    shift=1.5e12,
    store=2.5e-13,
    load=2.5e-13,
    call=3e-5,
    op=6e-6,
    library=300e12,
    library_brain=600e12,
    processors=132,
    gap=1.5e-6,
    memory=141 * 10**9,
)
DEVICES = {"h200": H200}  # that need not be here


def named(device: str) -> Rates:
    """Of a device that need not be here.

    Raises:
        ConfigError: a device without rates.
    """
    if device not in DEVICES:
        raise ConfigError(f"device={device!r}: expected {' or '.join(DEVICES)}, or none for this machine")
    return DEVICES[device]


@functools.cache
def rates_of(device_type: str) -> Rates:
    """Of this machine: measured at first use (a fraction of a second), then read from ``profile_path()``.

    ``DPFAST_PROFILE=usual`` takes ``USUAL`` instead: nothing is measured, nothing is written. A GPU counts as an H200.
    """
    if device_type == "cuda":
        return H200
    if device_type != "cpu" or os.environ.get("DPFAST_PROFILE") == "usual":
        return USUAL
    path = profile_path()
    try:
        return Rates(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    measured = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(measured)))
    except OSError:  # a read-only home: measured again next time
        pass
    return measured


def profile_path() -> Path:
    """One file for each version of torch, set of kernels and number of threads."""
    from dpfast.kernels.dispatch import backend, native_module

    kernels = native_module().instruction_set if backend() == "native" else "reference"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dpfast" / f"rates-4-{torch.__version__}-{kernels}-{torch.get_num_threads()}.json"


def measure() -> Rates:
    """On the CPU, from a call of each kind."""
    from dpfast.kernels import clip, conv

    generator = torch.Generator().manual_seed(0)
    b, c, size = 8, 64, 16
    a, g = (torch.randn(b, c, size, size, generator=generator) for _ in range(2))
    spec = conv.ConvSpec.of(torch.empty(c, c, 3, 3), padding=1)
    matrices = torch.randn(b, 256, 128, generator=generator)
    stored = torch.randn(b, 1 << 19, generator=generator)
    tiny, tiny_leaf = torch.zeros(1, 1), torch.zeros(1, 1, requires_grad=True)

    call = _fastest(lambda: clip.sq_norms(tiny))
    op = _fastest(lambda: torch.nn.functional.silu(tiny_leaf))
    product = _fastest(lambda: conv.sq_norms(a, g, spec, b))
    low_a, low_g = a.bfloat16(), g.bfloat16()
    brain = _fastest(lambda: conv.sq_norms(low_a, low_g, spec, b))
    gemm = _fastest(lambda: torch.bmm(matrices, matrices.mT))
    gram = _fastest(lambda: conv.gram_sq_norms(a, g, spec, b))
    store = _fastest(lambda: [torch.empty(1 << 20).fill_(1.0) for _ in range(4)])
    load = _fastest(lambda: clip.clipped_sum(stored, torch.ones(b)))
    rate, products = 2 * b * 256 * 256 * 128 / gemm, 2 * b * size * size * 9 * c * c
    shifts = max(gram - 2 * 2 * b * 256 * 256 * c / rate, 0.1 * gram)
    return Rates(
        product=products / product,
        brain=products / brain,
        gemm=rate,
        gemm_brain=rate,
        library=products / product,
        library_brain=products / brain,
        shift=b * 256 * 256 * 9 / 2 / shifts,
        store=store / (4 << 22),
        load=load / (4 * stored.numel()),
        call=call,
        op=op,
    )


def _fastest(step: Callable[[], object], repeats: int = 5) -> float:
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
