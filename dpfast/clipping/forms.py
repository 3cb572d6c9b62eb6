"""Which form computes a factored term's norms. The choice may change speed and memory, never the result."""

from typing import Literal

from dpfast.clipping.terms import FactoredTerm
from dpfast.performance import Performance

Chosen = Literal["gram", "direct", "materialise"]


FLOPS_PER_NUMBER = 16  # what writing and reading a number costs beside arithmetic on a CPU core: an estimate, not a fit


def choose(term: FactoredTerm, examples: int, performance: Performance, stored_bytes: int) -> Chosen:
    """The form for ``term``, with ``stored_bytes`` of per-example gradients stored already in this step.

    Gram costs ``2 M^2 (D + P)`` FLOPs per example and pays where that is less than writing and reading the ``D P``
    numbers of a gradient, each as dear as ``FLOPS_PER_NUMBER``: with few rows. Direct computes what materialising does
    and stores nothing, but has to compute the clipped sum anew: it is taken when the memory budget is spent.
    """
    if performance.form != "auto":
        return "direct" if performance.form == "example" else performance.form
    m, d, p = term.sizes()
    if 2 * m * m * (d + p) < FLOPS_PER_NUMBER * d * p:
        return "gram"
    budget = performance.memory_budget
    if budget is None or stored_bytes + stored_size(term, examples) <= budget:
        return "materialise"
    return "gram" if m * (d + p) < d * p else "direct"


def stored_size(term: FactoredTerm, examples: int) -> int:
    """Bytes of a term's per-example gradients in float32."""
    _, d, p = term.sizes()
    return 4 * examples * d * p
