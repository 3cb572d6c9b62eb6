"""GhostClipper held against the oracle, in every form."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from cases import losses
from dpfast import GhostClipper, Performance
from dpfast.performance import Form
from oracle import Clipped, assert_as_good_as_torch, per_example

FORMS = get_args(Form)


def clip(model, inputs, *, augmult, max_grad_norm, stability=None, form="auto", losses=losses) -> Clipped:
    rule = {} if stability is None else {"clipping": "automatic", "stability": stability}
    performance = Performance(form=form)
    clipper = GhostClipper(model, max_grad_norm=max_grad_norm, augmult=augmult, **rule, performance=performance)
    clipper.zero_grad()
    size = augmult if form == "example" else len(inputs[0])
    norms = []
    for start in range(0, len(inputs[0]), size):
        with clipper:
            norms.append(clipper.backward(losses(model, tuple(x[start : start + size] for x in inputs))).norms)
    sums = {name: p.grad.clone() for name, p in clipper.parameters.items()}
    clipper.zero_grad()
    return Clipped(torch.cat(norms), sums)


def flat_sum(clipper: GhostClipper, inputs, *, losses=losses, mask=None) -> torch.Tensor:
    """The clipped sum of all parameters, one after the other."""
    clipper.zero_grad()
    with clipper:
        clipper.backward(losses(clipper.model, inputs), example_mask=mask)
    total = torch.cat([p.grad.flatten() for p in clipper.parameters.values()])
    clipper.zero_grad()
    return total


def without(inputs, example: int, *, augmult: int):
    """The rows of all other examples."""
    keep = [row for row in range(len(inputs[0])) if row // augmult != example]
    return tuple(x[keep] for x in inputs)


def check(model, inputs, *, augmult: int, forms=FORMS, losses=losses, automatic: bool = False) -> None:
    """Half of the examples are clipped: C is the median of the exact norms; so is gamma of automatic clipping."""
    middle = per_example(model, losses, inputs, augmult=augmult, max_grad_norm=1.0).norms.median().item()
    settings = {"augmult": augmult, "max_grad_norm": middle, "stability": middle if automatic else None}
    exact = per_example(model, losses, inputs, **settings)
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    for form in forms:
        assert_as_good_as_torch(clip(model, inputs, **settings, form=form, losses=losses), plain, exact)


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """What went through the vmapped fallback meanwhile: the warnings that say so."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in said if "correct and slow" in str(w.message)]
