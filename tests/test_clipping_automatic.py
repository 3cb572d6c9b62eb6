"""Automatic clipping: against the oracle, and what its guarantee says, measured."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn

import checks
from cases import CONVOLUTIONS, LAYERS, PATTERNS, losses, unet, unet_inputs
from checks import check
from dpfast import DPTrainer, GhostClipper, Performance, Plan
from dpfast.data import ImageSet
from dpfast.errors import ConfigError
from dpfast.performance import Form
from oracle import per_example

FORMS = get_args(Form)
C, GAMMA, K = 0.7, 0.02, 2
without = partial(checks.without, augmult=K)


def clipper_of(model, **options) -> GhostClipper:
    return GhostClipper(model, max_grad_norm=C, augmult=K, clipping="automatic", stability=GAMMA, **options)


def flat_sum(model, inputs, *, form="auto", losses=losses) -> torch.Tensor:
    return checks.flat_sum(clipper_of(model, performance=Performance(form=form)), inputs, losses=losses)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unet()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return unet_inputs(5 * K)


CASES = {case.name: case for case in [*LAYERS, *CONVOLUTIONS, *PATTERNS]}


@pytest.mark.parametrize("name", ["linear-3d", "conv2d", "group-norm", "embedding", "used-twice", "weights-joined"])
def test_every_form_agrees_with_the_oracle(name) -> None:
    layer, inputs = CASES[name].build(rows=3 * K)
    check(layer, inputs, augmult=K, automatic=True)


def test_unet_agrees_with_the_oracle(model, inputs) -> None:
    check(model, inputs, augmult=K, automatic=True)


@pytest.mark.parametrize("form", FORMS)
def test_neighbours(model, inputs, form) -> None:
    """Dropping one example moves the sum by its share, which is C |G| / (|G| + gamma)."""
    whole = flat_sum(model, inputs, form=form)
    norms = per_example(model, losses, inputs, augmult=K, max_grad_norm=C).norms
    for example in range(5):
        moved = (whole - flat_sum(model, without(inputs, example), form=form)).norm().double()
        assert moved <= C * (1 + 1e-5)
        torch.testing.assert_close(moved, C * norms[example] / (norms[example] + GAMMA), rtol=5e-3, atol=0)
    replaced = tuple(x.clone() for x in inputs)
    replaced[0][:K] = 1e3
    assert (whole - flat_sum(model, replaced, form=form)).norm() <= 2 * C * (1 + 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_an_example_that_is_not_finite_contributes_nothing(model, inputs, form, value) -> None:
    spoiled = (inputs[0].clone(), *inputs[1:])
    spoiled[0][2 * K + 1, 0, 3, 3] = value
    expected = flat_sum(model, without(inputs, 2), form=form)
    torch.testing.assert_close(flat_sum(model, spoiled, form=form), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_an_example_without_a_gradient_contributes_nothing(model, inputs, form) -> None:
    """Its factor is C / gamma, not C / 0."""

    def silent(m, rows):
        return losses(m, rows) * (torch.arange(len(rows[0])) // K != 2)

    total = flat_sum(model, inputs, form=form, losses=silent)
    torch.testing.assert_close(total, flat_sum(model, without(inputs, 2), form=form), rtol=1e-4, atol=1e-6)


def test_rows_of_an_example_in_several_passes() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    exact = per_example(layer, losses, (x,), augmult=6, max_grad_norm=C, stability=GAMMA)
    clipper = GhostClipper(layer, max_grad_norm=C, augmult=6, clipping="automatic", stability=GAMMA)
    with clipper:
        for first in (0, 2, 4):
            clipper.backward(losses(layer, (x[first : first + 2],)), more=first < 4)
    for name, p in clipper.parameters.items():
        torch.testing.assert_close(p.grad.double(), exact.sums[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clipping": "auto"}, "clipping='auto': expected one of flat, automatic"),
        ({"clipping": "automatic", "stability": 0.0}, r"stability=0\.0: expected a finite number from 1e-08 on"),
        ({"clipping": "automatic", "stability": -1.0}, r"stability=-1\.0"),
        ({"clipping": "automatic", "stability": float("nan")}, "stability=nan"),
        ({"clipping": "automatic", "stability": 9e-9}, "stability=9e-09"),
        ({"clipping": "automatic", "stability": 1e-8, "max_grad_norm": 1e31}, "is too small for max_grad_norm=1e.31"),
    ],
)
def test_what_bounds_nothing_is_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GhostClipper(nn.Linear(2, 2), **{"max_grad_norm": 1.0, **options})


def test_trainer_clips_automatically() -> None:
    """One step without noise is one step along the oracle's sum."""
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    layer = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    def rows_of(images, labels):
        return images.float() / 255, labels

    def loss(m, rows):
        return nn.functional.cross_entropy(m(rows[0]), rows[1], reduction="none")

    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    rows = rows_of(images, labels)
    exact = per_example(layer, loss, rows, augmult=1, max_grad_norm=C, stability=GAMMA)
    plan = Plan(
        dataset_size=4,
        expected_batch_size=4,
        max_grad_norm=C,
        steps=1,
        target_epsilon=float("inf"),
        target_delta=1e-3,
    )
    trainer = DPTrainer(
        layer,
        ImageSet(images, labels, classes=("a", "b")),
        plan,
        objective=lambda m, images, labels, keys: loss(m, rows_of(images, labels)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        clipping="automatic",
        stability=GAMMA,
    )
    trainer.fit()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(
            (before[name] - p.detach()).double(), 0.1 * exact.sums[name] / 4, rtol=1e-3, atol=1e-6
        )
