"""Which form computes a factored term's norms. The choice may change speed and memory, never the result."""

from dpfast.kernels import cost
from dpfast.kernels.cost import Work
from dpfast.performance import Performance

# Seconds that a kept byte is worth, in times of writing one. 0 would store every gradient that is stored a little
# faster than computed twice; at 1 a UNet of 6M parameters (B = 8, K = 1) peaks at 1.00 instead of 1.19 times the
# non-private step, in 1.02 times the time.
PRICE = 1.0


def choose(work: Work, device_type: str, performance: Performance, stored_bytes: int) -> cost.Form:
    """The form for ``work``, with ``stored_bytes`` of per-example gradients stored already in this step."""
    if performance.form != "auto":
        return "direct" if performance.form == "example" else performance.form
    rates = cost.rates_of(device_type)
    form = cost.choose(work, rates, PRICE * rates.store)
    budget = performance.memory_budget
    if form == "materialise" and budget is not None and stored_bytes + work.gradients > budget:
        others: tuple[cost.Form, ...] = ("gram", "direct")
        return min(others, key=lambda other: cost.predict(work, other, rates).seconds)
    return form
