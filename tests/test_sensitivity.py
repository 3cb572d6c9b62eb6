"""assert_sensitivity: finds what moves too far, in dpfast's steps and in others', and says where."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dpfast import DPOptimizer, GhostClipper, Plan, poisson_sample
from dpfast.data import real_digits
from dpfast.errors import ConfigError
from dpfast.testing import assert_sensitivity

C = 0.1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))


def clipped(model, clipper):
    def step(examples):
        images, labels = examples
        with clipper:
            clipper.backward(cross_entropy(model(images), labels, reduction="none"))

    return step


def loop(model, *, clip=True, share=lambda count: 1.0):
    """Plain DP-SGD by a loop over examples."""

    def step(examples):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for image, label in zip(*examples, strict=True):
            loss = cross_entropy(model(image[None]), label[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.stack([g.norm() for g in grads]).norm()
            for sum_, g in zip(total, grads, strict=True):
                sum_ += g * ((C / norm).clamp(max=1) if clip else 1)
        return [sum_ * share(len(examples[0])) for sum_ in total]

    return step


def test_a_clipped_sum_keeps_its_promise_and_comes_near_it(model, data):
    found = assert_sensitivity(
        clipped(model, GhostClipper(model, max_grad_norm=C)),
        data,
        promised=C,
        model=model,
        added=(1e6 * data[0], data[1]),
    )
    assert 0.99 * C < found.measured <= C * (1 + 1e-5)
    assert set(found.parts) == {name for name, _ in model.named_parameters()}
    assert math.hypot(*found.parts.values()) == pytest.approx(found.measured)


def test_replacing_moves_twice_as_far(model, data):
    step = clipped(model, GhostClipper(model, max_grad_norm=C))
    with pytest.raises(AssertionError, match="replaced"):
        assert_sensitivity(step, data, promised=C, model=model, neighboring="replace")
    assert_sensitivity(step, data, promised=2 * C, model=model, neighboring="replace")


def test_a_loop_of_somebody_else(model, data):
    assert_sensitivity(loop(model), data, promised=C)
    with pytest.raises(AssertionError, match=r"times\): example \d removed. Moved most: "):
        assert_sensitivity(loop(model, clip=False), data, promised=C)
    with pytest.raises(AssertionError, match="promised"):
        assert_sensitivity(loop(model, share=lambda count: 1 / count), data, promised=C / 6)


def test_a_whole_step_with_sampling_noise_and_update(model, data):
    """Noise and sampling are the same in both worlds: what is left is C over the expected batch size."""
    plan = Plan(
        dataset_size=6, expected_batch_size=3, max_grad_norm=C, steps=1, target_delta=1e-2, noise_multiplier=1.0
    )

    def step(examples):
        clipper = GhostClipper(model, max_grad_norm=C)
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), plan, clipper)
        batch = poisson_sample(len(examples[0]), plan.sample_rate)
        clipped(model, clipper)([part[batch] for part in examples])
        optimizer.step()
        return dict(model.state_dict())

    found = assert_sensitivity(step, data, promised=C / 3, model=model, tolerance=1e-4)
    assert found.measured > 0.9 * C / 3


def test_image_sets_and_lists_of_examples():
    images = real_digits("train").select(range(4))

    def total(pixels):
        return [pixels.float().flatten(1).sum(0)]

    most = max(float(image.float().norm()) for image in images.images)
    assert assert_sensitivity(lambda some: total(some.images), images, promised=most).measured == pytest.approx(most)
    examples = list(images.images)
    found = assert_sensitivity(lambda some: total(torch.stack(some)), examples, promised=most)
    assert found.measured == pytest.approx(most)


def test_what_is_not_a_number_moves_too_far(data):
    with pytest.raises(AssertionError, match="sensitivity nan"):
        assert_sensitivity(lambda examples: examples[0].sum() * math.nan, data, promised=C)


def test_a_step_that_is_not_repeatable_is_named(data):
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ConfigError, match="the same data set gave results"):
        assert_sensitivity(lambda examples: torch.randn(3, generator=own), data, promised=C)


def test_a_bound_that_nothing_comes_near_is_warned_of(model, data):
    with pytest.warns(UserWarning, match="this shows little"):
        assert_sensitivity(loop(model), data, promised=1e3)


@pytest.mark.parametrize(
    ("step", "said"), [(lambda examples: 1.0, "the step gave float"), (lambda examples: None, "the step gave NoneType")]
)
def test_results_that_are_no_tensors_are_refused(step, said, data):
    with pytest.raises(ConfigError, match=said):
        assert_sensitivity(step, data, promised=C)
