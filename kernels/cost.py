"""What a form costs: seconds and kept bytes, from the FLOPs and bytes of each kernel and the rates of a device.

Predictions choose between forms, so ratios between them matter, not seconds.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from dpfast.kernels.conv.launches import LEAST, chosen, measuring, of_tile, shares
from dpfast.kernels.linear.launches import GRAMS
from dpfast.kernels.rates import Rates

Form = Literal["gram", "direct", "materialise"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Work:
    """The per-example gradients of one weight: B ``examples`` of M ``rows`` (augmentations times positions), D
    ``inputs``, P ``outputs``.

    pixels: what a Gram multiplies per row, instead of D where it is one of pixels; taps: of the kernel; held: bytes of
    a and g, which forms that do not store gradients keep; dense: whether gradients are products (not looked-up rows);
    sharing: how many weights have this input, of which one Gram is made; brain: whether a and g are in half precision;
    groups: of a convolution, between which P is shared out; positions: of an image, which a share keeps together.
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
    groups: int = 1
    positions: int = 1

    @property
    def products(self) -> float:
        """FLOPs of all gradients, once."""
        return 2.0 * self.examples * self.rows * self.inputs * self.outputs if self.dense else 0.0

    @property
    def gradients(self) -> int:
        """Bytes of all gradients in float32."""
        return 4 * self.examples * self.inputs * self.outputs


@dataclass(frozen=True)
class Kernel:
    """A call of an op. seconds: that its kernels take, on the CPU with the call; a GPU works behind its calls."""

    op: str
    shape: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """seconds: norms and clipped sum together. kept: bytes that stay until the factors are known."""

    seconds: float
    kept: int


def predict(work: Work, form: Form, rates: Rates) -> Cost:
    """Of one form."""
    kept = work.gradients if form == "materialise" else work.held
    return Cost(sum(kernel.seconds for kernel in kernels(work, form, rates)), kept)


def kernels(work: Work, form: Form, rates: Rates) -> tuple[Kernel, Kernel]:
    """What a form calls: one for the norms, one for the clipped sum."""
    if form == "materialise":
        stored = _products(work, rates, stored=True) + work.gradients * rates.store
        return (
            _kernel("per_example_grads", work, work.products, work.held + work.gradients, stored, rates),
            _kernel("clip.clipped_sums", work, work.gradients / 2, work.gradients, work.gradients * rates.load, rates),
        )
    if form == "direct" and not work.dense:  # looked-up rows are sorted, and added up where they are the same
        seconds = 3 * work.held * (rates.store + rates.load)
        norms, total = (
            _kernel(op, work, 0.0, 3 * work.held, seconds, rates, ops=10) for op in ("sq_norms", "clipped_sum")
        )
        return norms, total
    if form == "direct":
        return _of_products("sq_norms", work, rates), _of_products("clipped_sum", work, rates)
    pairs = float(work.examples * work.rows**2)
    flops = 2 * pairs * (work.pixels / work.sharing + work.outputs)
    is_of_pixels = work.pixels < work.inputs
    bytes_ = work.held + (4 * pairs if is_of_pixels else 0.0)
    shifts = pairs * (work.taps if is_of_pixels else 1) / 2
    gram = flops * _computed(work, rates) / _rate(rates.gemm, rates.gemm_brain, work) + shifts / rates.shift
    if rates.is_gpu:
        gram = max(gram, bytes_ * rates.load)
    is_one = work.taps == 1 and not (rates.is_gpu and work.rows >= LEAST)
    total = _as_one_product(work, rates) if is_one else _of_products("clipped_sum", work, rates)
    return _kernel("gram_sq_norms", work, flops, bytes_, gram, rates, calls=3), total


def _computed(work: Work, rates: Rates) -> float:
    """What a Gram takes of its products' time: on a GPU half of the tiles, by symmetry, each loaded for itself."""
    if not rates.is_gpu:
        return 1.0
    m = GRAMS[work.brain, True].m
    side = math.ceil(work.rows / m)
    return side * (side + 1) / 2 * of_tile(m, m, work.brain) / work.rows**2


def _of_products(op: str, work: Work, rates: Rates) -> Kernel:
    """Gradients that are made and not kept: those of a CPU pass through its cache, to be measured or added."""
    through = 0.0 if rates.is_gpu else work.gradients * rates.load
    seconds = _products(work, rates, total=op == "clipped_sum") + through
    return _kernel(op, work, work.products, work.held, seconds, rates)


def _as_one_product(work: Work, rates: Rates) -> Kernel:
    """The sum of a linear layer, over all rows, in float32."""
    seconds = work.products / (rates.gemm if rates.is_gpu else _rate(rates.gemm, rates.gemm_brain, work))
    return _kernel("weighted_sum", work, work.products, work.held, seconds, rates)


def _products(work: Work, rates: Rates, *, total: bool = False, stored: bool = False) -> float:
    """Seconds for all gradients once; ``total``: in a sum over examples; ``stored``: they are kept."""
    rate = _rate(rates.product, rates.brain, work)
    if not (rates.is_gpu and work.products):
        return work.products / rate
    sizes = (work.examples, 1, work.groups, work.inputs // work.taps, work.outputs // work.groups)
    aligned = 8 if work.brain else 4  # numbers of sixteen bytes
    described = work.groups == 1 and sizes[3] % aligned == sizes[4] % aligned == 0
    asked, how = (sizes, work.rows, work.taps, rates.processors), {"described": described, "half": work.brain}
    if stored:
        _, time = shares(*asked, most=work.rows // work.positions, **how)
    elif total:
        time = chosen(*asked, total=True, **how).time
    else:
        time = measuring(*asked, **how).time
    return max(2.0 * time * rates.processors / rate, work.held * rates.load)


def _rate(full: float, brain: float, work: Work) -> float:
    return brain if work.brain else full


def _kernel(
    op: str, work: Work, flops: float, bytes_: float, seconds: float, rates: Rates, *, calls: int = 1, ops: int = 0
) -> Kernel:
    """calls: of dpfast's ops, or of torch's (``ops``), each a few kernels on a GPU."""
    calling = 3 * max(calls, ops) * rates.gap if rates.is_gpu else ops * rates.op or calls * rates.call
    shape = f"B={work.examples} M={work.rows} D={work.inputs} P={work.outputs}"
    return Kernel(op, shape, flops, bytes_, seconds + calling)


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
