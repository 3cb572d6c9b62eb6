"""The promised sensitivity, measured on networks that nobody thought of: every form, dtype, layout and K."""

import itertools
import warnings
from typing import get_args

import pytest
import torch
from hypothesis import given

import trust
from architectures import architectures
from cases import LAYOUTS, losses, relayout
from checks import clip
from dpfast import GhostClipper, Performance
from dpfast.performance import Dtype, Form
from dpfast.testing import assert_sensitivity

EXAMPLES, AUGMULTS = 4, (1, 2, 4)
EVERY = list(itertools.product(get_args(Form), get_args(Dtype), LAYOUTS, AUGMULTS))
# Each form in each dtype, layouts and K in turns.
SOME = [
    (form, dtype, LAYOUTS[i % len(LAYOUTS)], AUGMULTS[i % len(AUGMULTS)])
    for i, (form, dtype) in enumerate(itertools.product(get_args(Form), get_args(Dtype)))
]
TOLERANCE = 1e-5  # relative, of rounding: sums and norms are in float32 whatever the model computes in


def clipped_sum(clipper, *, augmult, layout, dtype):
    """A step for ``assert_sensitivity``: the clipped sum of examples whose rows lie in memory as ``layout`` says."""

    def step(examples):
        images, labels = examples
        size = augmult if clipper.one_by_one else augmult * len(labels)
        for rows, of in zip(
            images.flatten(0, 1).split(size), labels.repeat_interleave(augmult).split(size), strict=True
        ):
            with clipper, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                clipper.backward(losses(clipper.model, (relayout(rows, layout), of)))
        sums = {name: p.grad.clone() for name, p in clipper.parameters.items()}
        clipper.zero_grad()
        return sums

    return step


def measured(architecture, cases):
    """What was measured over what was promised, by case."""
    model, found = architecture.build(), {}
    for augmult, group in itertools.groupby(sorted(cases, key=lambda case: case[3]), key=lambda case: case[3]):
        images, labels = architecture.inputs(EXAMPLES, augmult)
        rows = images.flatten(0, 1), labels.repeat_interleave(augmult)
        promised = clip(model, rows, augmult=augmult, max_grad_norm=1.0).norms.median().item()
        clippers = {}
        for form, dtype, layout, _ in group:
            if (form, dtype) not in clippers:
                performance = Performance(form=form)
                clippers[form, dtype] = GhostClipper(
                    model, max_grad_norm=promised, augmult=augmult, performance=performance
                )
            step = clipped_sum(clippers[form, dtype], augmult=augmult, layout=layout, dtype=dtype)
            for size in (EXAMPLES - 1, EXAMPLES, EXAMPLES + 1):  # "auto" chooses anew once it has seen a step
                step((images.repeat(2, 1, 1, 1, 1)[:size], labels.repeat(2)[:size]))
            sensitivity = assert_sensitivity(
                step,
                (images, labels),
                promised=promised,
                added=(100 * images[:1], labels[:1]),
                tolerance=TOLERANCE,
            )
            found[form, dtype, layout, augmult] = sensitivity.measured / promised
    return found


@pytest.mark.timeout(3600 if trust.FULL else 300)
def test_the_promised_sensitivity_of_networks_that_nobody_thought_of():
    seen, tried = [], set()

    @trust.tries(few=3, many=25)
    @given(architectures())
    def every_case_of_one(architecture):
        tried.add(architecture)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*correct and slow")  # the vmapped fallback
            # After an instance norm the mean of positions hardly moves: a probe in bfloat16 sees nothing, and says so.
            warnings.filterwarnings("ignore", message=".*its output does not depend on its input")
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # torch's, of RMSNorm
            seen.append(measured(architecture, EVERY if trust.FULL else SOME))

    every_case_of_one()
    assert len(tried) >= (20 if trust.FULL else 3)
    ratios = {
        dtype: [ratio for found in seen for case, ratio in found.items() if case[1] == dtype]
        for dtype in get_args(Dtype)
    }
    for found in ratios.values():
        assert 0.9 < max(found) <= 1 + TOLERANCE
    trust.record(
        "sensitivity",
        architectures=len(tried),
        cases=sum(map(len, seen)),
        excess={dtype: max(found) - 1 for dtype, found in ratios.items()},
        nearest={dtype: min(found) for dtype, found in ratios.items()},
    )
