"""Which form computes a factored term's norms. The choice may change speed and memory, never the result."""

from collections.abc import Hashable, Iterable

from dpfast.kernels import cost
from dpfast.kernels.cost import Work
from dpfast.kernels.rates import USUAL, Rates, rates_of
from dpfast.performance import Performance

# Seconds that a kept byte is worth: what writing one to fresh memory takes on a usual machine. 0 would store every
# gradient that is stored a little faster than computed twice; so a UNet of 6M parameters (B = 8, K = 1) peaks at 1.00
# instead of 1.19 times the non-private step, in 1.02 times the time. Not what this machine takes: where the allocator
# keeps its memory, writing costs a tenth, and memory is worth no less.
PRICE = USUAL.store
MOST_STEPS = 256  # kinds of steps whose works are remembered


class Forms:
    """Chooses forms for the steps of one clipper.

    With a memory budget the first step of a kind stores gradients until the budget is full; then its works are known,
    and later steps of its kind take those forms that fit the budget in the least predicted time.
    """

    def __init__(self, performance: Performance, rates: Rates | None = None) -> None:
        """rates: of a device that need not be here; otherwise of the one that a step runs on."""
        self.performance = performance
        self.rates = rates
        self._known: dict[Hashable, tuple[Work, ...]] = {}

    def choose(self, work: Work, device_type: str, kind: Hashable, stored_bytes: int) -> cost.Form:
        """The form for ``work`` in a step of this ``kind`` that has stored so many bytes of gradients."""
        wanted, budget = self.performance.form, self.performance.memory_budget
        if wanted != "auto":
            return "direct" if wanted == "example" else wanted
        rates = self.rates or rates_of(device_type)
        price = rates.store if rates.is_gpu else PRICE
        if budget is None:
            return cost.choose(work, rates, price)
        if kind in self._known:
            return cost.choose(work, rates, cost.price_within(self._known[kind], rates, price, budget))
        form = cost.choose(work, rates, price)
        return form if stored_bytes + work.gradients <= budget else _leanest(work, rates)

    def learn(self, kind: Hashable, works: Iterable[Work]) -> None:
        """Remember what a step of this ``kind`` had to choose for."""
        if self.performance.memory_budget is not None and kind not in self._known:
            if len(self._known) >= MOST_STEPS:
                self._known.clear()
            self._known[kind] = tuple(works)


def _leanest(work: Work, rates: Rates) -> cost.Form:
    others: tuple[cost.Form, ...] = ("gram", "direct")
    return min(others, key=lambda form: cost.predict(work, form, rates).seconds)
