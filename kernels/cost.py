"""What a form costs: seconds and kept bytes, from the FLOPs and bytes of each op and the rates of a device.

The rates (``Rates``) are measured once per machine and cached; without a measurement those of ``USUAL`` are taken.
Predictions choose between forms, so ratios between them matter, not seconds.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

Form = Literal["gram", "direct", "materialise"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Rates:
    """product, brain: FLOP/s of per-example weight gradients from float32, from bfloat16; gemm: of batched matrix
    products; shift: products per second of shifted sums over Grams; store, load: seconds to write, to read a byte;
    call, op: seconds to call an op of dpfast, of torch.
    """

    product: float
    brain: float
    gemm: float
    shift: float
    store: float
    load: float
    call: float
    op: float


# Two cores of a Zen 3 server, native kernels.
USUAL = Rates(product=130e9, brain=130e9, gemm=110e9, shift=4e9, store=2.5e-10, load=8e-11, call=3e-5, op=1e-5)


@dataclass(frozen=True)
class Work:
    """The per-example gradients of one weight: B ``examples`` of M ``rows`` (augmentations times positions), D
    ``inputs``, P ``outputs``.

    pixels: what a Gram multiplies per row instead of D; taps: shifts it is looked at through; held: bytes of a and g,
    which forms that do not store gradients keep; dense: whether gradients are products (not looked-up rows);
    sharing: how many weights have this input, of which one Gram is made; brain: whether a and g are bfloat16.
    """

    examples: int
    rows: int
    inputs: int
    outputs: int
    pixels: int
    taps: int = 1
    held: int = 0
    dense: bool = True
    sharing: int = 1
    brain: bool = False

    @property
    def products(self) -> float:
        """FLOPs of all gradients, once."""
        return 2.0 * self.examples * self.rows * self.inputs * self.outputs if self.dense else 0.0

    @property
    def gradients(self) -> int:
        """Bytes of all gradients in float32."""
        return 4 * self.examples * self.inputs * self.outputs


@dataclass(frozen=True)
class Cost:
    """seconds: norms and clipped sum together. kept: bytes that stay until the factors are known."""

    seconds: float
    kept: int


def predict(work: Work, form: Form, rates: Rates) -> Cost:
    """Of one form."""
    once = work.products / (rates.brain if work.brain else rates.product)
    if form == "materialise":
        return Cost(once + work.gradients * (rates.store + rates.load) + 2 * rates.call, work.gradients)
    through = work.gradients * rates.load  # every gradient passes through the cache, to be measured or added
    if form == "direct" and not work.dense:  # looked-up rows are sorted, and added up where they are the same
        return Cost(2 * (3 * work.held * (rates.store + rates.load) + 10 * rates.op), work.held)
    if form == "direct":
        return Cost(2 * (once + through + rates.call), work.held)
    pairs = float(work.examples * work.rows**2)
    gram = 2 * pairs * (work.pixels / work.sharing + work.outputs) / rates.gemm + pairs * work.taps / 2 / rates.shift
    # The sum of a linear layer is one matrix product over all rows.
    total = once + through if work.taps > 1 else work.products / rates.gemm
    return Cost(gram + total + 4 * rates.call, work.held)


@functools.lru_cache(maxsize=4096)
def choose(work: Work, rates: Rates, price: float) -> Form:
    """The form with the least predicted seconds, where a kept byte costs ``price`` seconds more."""

    def value(form: Form) -> float:
        cost = predict(work, form, rates)
        return cost.seconds + price * cost.kept

    return min(FORMS, key=value)


@functools.lru_cache(maxsize=256)
def price_within(works: tuple[Work, ...], rates: Rates, price: float, budget: int) -> float:
    """The lowest price, from ``price`` on, at which the chosen forms of ``works`` keep at most ``budget`` bytes.

    A knapsack by its Lagrangian: the forms chosen at a price are the fastest of all that keep no more bytes. Where not
    even the leanest forms fit, theirs is the price.
    """

    def kept(at: float) -> int:
        return sum(predict(work, choose(work, rates, at), rates).kept for work in works)

    low, high = price, max(price, 1e3 * rates.store)  # at a thousand writes a byte nothing is kept for its speed
    if kept(low) <= budget:
        return low
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if kept(middle) <= budget else (middle, high)
    return high


# Rates of this machine


@functools.cache
def rates_of(device_type: str) -> Rates:
    """Measured at first use (a fraction of a second), then read from ``profile_path()``.

    ``DPFAST_PROFILE=usual`` takes ``USUAL`` instead: nothing is measured, nothing is written.
    """
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
    return cache / "dpfast" / f"rates-3-{torch.__version__}-{kernels}-{torch.get_num_threads()}.json"


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
