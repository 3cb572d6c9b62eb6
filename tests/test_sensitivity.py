"""assert_sensitivity and audit_step: find what moves too far, or betrays too much, in dpfast's steps and in others'."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dpfast import DPOptimizer, DPTrainer, GhostClipper, Plan, poisson_sample
from dpfast.data import real_digits
from dpfast.errors import ConfigError
from dpfast.privacy import Ledger, entropy
from dpfast.testing import assert_sensitivity, audit_step, injected_entropy

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


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_a_sampled_step_is_run_until_its_sample_holds_the_example(rate):
    """Nothing is clipped: that the first sample lacks who differs must not hide it."""
    layer, vectors = nn.Linear(3, 1), 5 * torch.randn(24, 3, generator=torch.Generator().manual_seed(0))

    def step(examples):
        layer(examples[poisson_sample(len(examples), rate)]).sum().backward()

    for seed in range(5):
        with pytest.raises(AssertionError, match="promised 1 "):
            assert_sensitivity(step, vectors, promised=1.0, model=layer, neighbors=4, seed=seed)


def test_a_step_that_does_not_depend_on_its_data_shows_nothing():
    with pytest.raises(ConfigError, match="no example moved a result"):
        assert_sensitivity(lambda examples: torch.ones(2), torch.ones(4, 3), promised=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"promised": value} for value in (0.0, -1.0, math.nan, math.inf)),
        {"neighbors": 0},
        {"tolerance": -1.0},
        {"added": [torch.ones(3)]},
        {"added": (torch.ones(1, 3),)},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=name):
        assert_sensitivity(lambda examples: examples.sum(0), torch.ones(4, 3), **{"promised": 9.0, **arguments})


@pytest.mark.parametrize("arguments", [{"epsilon": -1.0}, {"epsilon": math.nan}, {"repetitions": 0}], ids=str)
def test_audits_that_make_no_sense(vectors, arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=name):
        audit_step(gaussian(), vectors, **{"epsilon": 1.0, "delta": DELTA, **arguments})


def test_a_whole_trainer_is_a_step():
    """As the docstring has it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)

    def losses(model, examples, keys):
        return model(examples.repeat_interleave(keys.augmult, 0)).square().sum(1)

    def step(examples):
        plan = one_step(size=len(examples), rate=0.75)
        before = [p.detach().clone() for p in model.parameters()]
        sgd = functools.partial(torch.optim.SGD, lr=1.0)
        DPTrainer(model, examples, plan, objective=losses, optimizer=sgd, augmult=2).fit()
        return [(p - was) * plan.expected_batch_size for p, was in zip(model.parameters(), before, strict=True)]

    found = assert_sensitivity(step, 5 * torch.randn(6, 4), promised=C, model=model, neighbors=3)
    assert found.measured > 0.99 * C


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


# Two worlds

DELTA = 1e-3


def gaussian(*, noise=1.0, draw=lambda: torch.randn(4)):
    """The sum of examples of length 1 at most, with as much noise."""

    def step(examples):
        clipped = examples / examples.norm(dim=1, keepdim=True).clamp(min=1)
        return clipped.sum(0) + noise * draw()

    return step


def one_step(*, size=6, rate=1.0, noise_multiplier=1.0) -> Plan:
    return Plan(
        dataset_size=size,
        expected_batch_size=size * rate,
        max_grad_norm=C,
        steps=1,
        target_delta=DELTA,
        noise_multiplier=noise_multiplier,
    )


@pytest.fixture
def vectors():
    return 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def _fixed():
    """So that no test of an audit fails by chance."""
    with injected_entropy(0):
        yield


@pytest.mark.usefixtures("_fixed")
@pytest.mark.parametrize("draw", [lambda: torch.randn(4), lambda: entropy.standard_normal([4])])
def test_a_sound_gaussian_step_is_not_refuted_and_its_bound_is_not_empty(vectors, draw):
    epsilon = one_step().epsilon()
    found = audit_step(gaussian(draw=draw), vectors, epsilon=epsilon, delta=DELTA, repetitions=2000)
    assert 0.4 * epsilon < found.epsilon <= epsilon
    assert (found.delta, found.confidence) == (DELTA, 0.95)


@pytest.mark.usefixtures("_fixed")
@pytest.mark.parametrize(
    ("step", "examples"),
    [(gaussian(noise=0.25), None), (lambda examples: examples.sum(0) + torch.randn(4), torch.full((1, 4), 5.0))],
    ids=["a quarter of the noise", "an extreme example that is not clipped"],
)
def test_a_step_that_betrays_more_than_is_claimed_fails(vectors, step, examples):
    with pytest.raises(AssertionError, match=r"epsilon is at least \S+ \(delta 0.001, confidence 0.95\), claimed 4"):
        audit_step(step, vectors, epsilon=4.0, delta=DELTA, added=examples)


def test_noise_that_is_always_the_same_betrays_everything(vectors):
    def draw():
        torch.manual_seed(0)
        return torch.randn(4)

    with pytest.raises(AssertionError, match=r"epsilon is at least 4.*told apart every time: is"):
        audit_step(gaussian(noise=100.0, draw=draw), vectors, epsilon=1.0, delta=DELTA)


@pytest.mark.usefixtures("_fixed")
def test_a_sampled_step_is_audited_where_the_example_was_drawn():
    """Of vectors that are nearly orthogonal: those that are alike would hide each other by coming and going."""
    plan, wide = one_step(rate=0.25), torch.randn(6, 64, generator=torch.Generator().manual_seed(3))

    def sampled(noise):
        step = gaussian(noise=noise, draw=lambda: torch.randn(64))
        return lambda examples: step(examples[poisson_sample(len(examples), plan.sample_rate)])

    settings = {"epsilon": plan.epsilon(), "delta": DELTA}
    audit_step(sampled(1.0), wide, **settings)
    with pytest.raises(AssertionError, match="claimed"):
        audit_step(sampled(0.1), wide, **settings)


@pytest.mark.usefixtures("_fixed")
def test_a_whole_step_of_dpfast_is_audited(monkeypatch):
    torch.manual_seed(0)
    model, plan = nn.Linear(4, 2), one_step(noise_multiplier=4.0)
    data, clipper = torch.randn(6, 4), GhostClipper(model, max_grad_norm=C)

    def step(examples):
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), plan, clipper, Ledger(None, plan))
        with clipper:
            clipper.backward(model(examples).square().sum(1))
        optimizer.step()
        return dict(model.state_dict())

    settings = {"epsilon": plan.epsilon(), "delta": DELTA, "model": model, "repetitions": 150}
    audit_step(step, data, **settings)
    monkeypatch.setattr("dpfast.optimizer.noised", lambda x, scale, by, grid: entropy.noised(x, scale / 8, by))
    with pytest.raises(AssertionError, match="claimed"):
        audit_step(step, data, **settings)


def test_an_audit_that_could_refute_nothing_says_so(vectors):
    with pytest.warns(UserWarning, match="40 repetitions show no epsilon beyond 1.6.*, where 9 is claimed"):
        audit_step(gaussian(), vectors, epsilon=9.0, delta=DELTA, repetitions=40)


def test_an_audit_of_what_does_not_depend_on_its_data(vectors):
    with pytest.raises(ConfigError, match="no example moved a result"):
        audit_step(lambda examples: torch.randn(4), vectors, epsilon=1.0, delta=DELTA)


@pytest.mark.parametrize("rare", [False, True])
def test_results_that_are_not_finite_fail_an_audit(vectors, rare):
    def step(examples):
        broken = not rare or (not entropy.is_injected() and torch.rand(()) < 0.1)
        return examples.sum(0) * (math.nan if broken else 1.0)

    with pytest.raises(AssertionError, match="results that are not finite"):
        audit_step(step, vectors, epsilon=1.0, delta=DELTA)
