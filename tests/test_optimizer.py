"""DPOptimizer: what it adds, what it divides by, what it refuses, and in which order."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from dpfast.errors import BudgetExhausted, ConfigError, DPFastError, LedgerError, PrivacyError
from dpfast.optimizer import DPOptimizer
from dpfast.privacy import Ledger, Plan, standard_normal
from dpfast.testing import injected_entropy


class FakeClipper:
    """Writes the sums it is given, and knows a gradient by its tensor and version as GhostClipper does."""

    augmult = 1

    def __init__(self, model, max_grad_norm=0.5):
        self.max_grad_norm = max_grad_norm
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._written = {}
        self.shown_again = 0

    def write(self, **sums):
        for name, total in sums.items():
            p = self.parameters[name]
            p.grad = torch.full_like(p, total)
            self._written[name] = (p.grad, p.grad._version)

    def foreign_gradients(self):
        return [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and self._written.get(name) != (p.grad, p.grad._version)
        ]

    def show_again(self):
        self.shown_again += 1

    def zero_grad(self):
        self._written.clear()
        for p in self.parameters.values():
            p.grad = None


def make_plan(**changes):
    values = {
        "dataset_size": 1000,
        "expected_batch_size": 20,
        "max_grad_norm": 0.5,
        "steps": 10,
        "target_delta": 1e-5,
        "noise_multiplier": 3.0,
    }
    if "target_epsilon" in changes:
        del values["noise_multiplier"]
    return Plan(**{**values, **changes})


NO_NOISE = {"target_epsilon": math.inf}


class Setup:
    """A linear model with zero weights, so that after one SGD step of rate 1 the weights are -grad."""

    def __init__(self, shape=(3, 2), dtype=torch.float32, inner=torch.optim.SGD, ledger=None, **plan):
        self.model = nn.Linear(*shape, dtype=dtype)
        for p in self.model.parameters():
            nn.init.zeros_(p)
        self.plan = make_plan(**plan)
        self.clipper = FakeClipper(self.model)
        self.optimizer = DPOptimizer(inner(self.model.parameters(), lr=1.0), self.plan, self.clipper, ledger)

    def update(self):
        return torch.cat([-p.detach().flatten() for p in self.model.parameters()])


def test_the_sum_is_divided_by_the_expected_batch_size():
    setup = Setup(**NO_NOISE)
    setup.clipper.write(weight=5.0, bias=-7.0)
    setup.optimizer.step()
    assert torch.equal(setup.model.weight, torch.full((2, 3), -5.0 / 20))
    assert torch.equal(setup.model.bias, torch.full((2,), 7.0 / 20))


@pytest.mark.parametrize("sums", [{}, {"weight": 1.0}, {"weight": 1.0, "bias": 1.0}])
def test_the_noise_has_the_planned_scale_used_or_not(sums):
    """Sum of squares of 300,300 coordinates, a chi-square variable, with fixed entropy: this cannot flake."""
    with injected_entropy(11):
        setup = Setup(shape=(1000, 300))
        setup.clipper.write(**sums)
        setup.optimizer.step()
    expected = 3.0 * 0.5 / 20
    for name, p in setup.model.named_parameters():
        noise = (-p.detach().double() - sums.get(name, 0.0) / 20) / expected
        low, high = stats.chi2.interval(0.9999, noise.numel())
        assert low < (noise**2).sum() < high, name
        assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_the_noise_is_independent_over_coordinates_parameters_and_steps():
    with injected_entropy(12):
        setup = Setup(shape=(3, 2), steps=1000)
        draws = []
        for _ in range(1000):
            for p in setup.model.parameters():
                nn.init.zeros_(p)
            setup.optimizer.step()
            draws.append(setup.update().double())
    scaled = torch.stack(draws) / (3.0 * 0.5 / 20)
    covariance = scaled.T @ scaled / len(scaled)
    # Each entry has standard error 1/sqrt(1000) = 0.032 (0.045 on the diagonal).
    assert (covariance - torch.eye(8)).abs().max() < 4.5 * 0.045
    lagged = scaled[1:].T @ scaled[:-1] / len(scaled)
    assert lagged.abs().max() < 4.5 * 0.032


def test_two_optimizers_never_draw_the_same_noise():
    first, second = Setup(), Setup()
    for setup in (first, second):
        torch.manual_seed(0)
        setup.optimizer.step()
    assert not (first.update() == second.update()).any()
    with injected_entropy(13):
        first, second = Setup(), Setup()
        first.optimizer.step()
        second.optimizer.step()
    assert not (first.update() == second.update()).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_noise_is_added_in_float64_and_cast_once(dtype):
    setup = Setup(shape=(100, 10), dtype=dtype)
    setup.clipper.write(weight=1.0)
    with injected_entropy(14):
        setup.optimizer.step()
    with injected_entropy(14):
        expected = (1.0 + 3.0 * 0.5 * standard_normal([10, 100])) / 20
    last = 1e-15 if dtype == torch.float64 else 0  # an operation may be fused with the next one
    torch.testing.assert_close(-setup.model.weight.detach(), expected.to(dtype), rtol=last, atol=last)


def test_gradients_are_cleared_after_the_step():
    setup = Setup()
    setup.clipper.write(weight=1.0, bias=1.0)
    setup.optimizer.step()
    assert all(p.grad is None for p in setup.model.parameters())
    setup.clipper.write(weight=1.0)
    setup.optimizer.zero_grad()
    assert setup.model.weight.grad is None
    assert setup.clipper._written == {}


def test_frozen_parameters_stay_as_they_are():
    setup = Setup()
    setup.model.bias.requires_grad_(False)
    setup.optimizer.step()
    assert not setup.model.bias.any()
    assert setup.model.weight.all()


def assert_refused(setup, match, error=PrivacyError):
    """Refused before anything is written, drawn or charged."""
    before = [p.detach().clone() for p in setup.model.parameters()]
    grads = [p.grad for p in setup.model.parameters()]
    charged = setup.optimizer.steps_taken
    with pytest.raises(error, match=match):
        setup.optimizer.step()
    assert setup.optimizer.steps_taken == charged
    for p, value, grad in zip(setup.model.parameters(), before, grads, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad


def test_refuses_another_clip_norm():
    setup = Setup()
    setup.clipper.max_grad_norm = 0.5000001
    assert_refused(setup, r"max_grad_norm=0\.5000001, the plan says 0\.5")


def test_refuses_a_parameter_that_is_not_clipped():
    setup = Setup()
    setup.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    assert_refused(setup, r"a parameter of shape \(7,\) is optimized but not clipped")


def test_refuses_a_parameter_that_is_not_optimized():
    setup = Setup()
    setup.optimizer.optimizer = torch.optim.SGD([setup.model.weight], lr=1.0)
    assert_refused(setup, "bias is clipped but not optimized")


def test_refuses_a_gradient_that_autograd_wrote():
    setup = Setup()
    setup.model(torch.ones(1, 3)).sum().backward()
    assert_refused(setup, "weight, bias: the gradient is not what the clipper wrote")


def test_refuses_a_gradient_that_was_changed_in_place():
    setup = Setup()
    setup.clipper.write(weight=1.0)
    setup.model.weight.grad.mul_(2)
    assert_refused(setup, "weight: the gradient is not what the clipper wrote")


def test_refuses_a_gradient_on_a_frozen_parameter():
    setup = Setup()
    setup.clipper.write(bias=1.0)
    setup.model.bias.requires_grad_(False)
    assert_refused(setup, "bias is frozen but has a gradient")


def test_refuses_a_closure():
    setup = Setup()
    with pytest.raises(PrivacyError, match=r"call step\(\) without one"):
        setup.optimizer.step(lambda: 0.0)
    assert setup.optimizer.steps_taken == 0


def test_refuses_the_step_after_the_last():
    setup = Setup(steps=2)
    setup.optimizer.step()
    setup.optimizer.step()
    assert_refused(setup, "all 2 planned steps are spent", BudgetExhausted)


def test_every_reason_comes_in_one_message():
    setup = Setup(steps=1)
    setup.optimizer.step()
    setup.clipper.max_grad_norm = 9.0
    setup.model.weight.grad = torch.ones(2, 3)
    assert_refused(setup, r"(?s)weight: the gradient.*max_grad_norm=9\.0.*all 1 planned", BudgetExhausted)


def test_refuses_a_ledger_of_another_plan():
    with pytest.raises(PrivacyError, match="another plan"):
        Setup(ledger=Ledger(None, make_plan(steps=11)))


def test_refuses_an_optimizer_that_needs_a_closure():
    with pytest.raises(ConfigError, match="LBFGS"):
        Setup(inner=torch.optim.LBFGS)


class Failing(torch.optim.SGD):
    """Fails in the update, like a device that runs out of memory."""

    def step(self, closure=None):
        raise RuntimeError("out of memory")


def test_the_ledger_holds_the_step_before_the_update(tmp_path):
    plan = make_plan()
    with Ledger(tmp_path / "ledger", plan) as ledger:
        setup = Setup(inner=Failing, ledger=ledger)
        with pytest.raises(RuntimeError, match="out of memory"):
            setup.optimizer.step()
        assert setup.optimizer.steps_taken == 1
        assert all(p.grad is None for p in setup.model.parameters())
    with Ledger(tmp_path / "ledger", plan) as ledger:
        assert ledger.charged_steps == 1


def test_no_noise_is_drawn_when_the_ledger_cannot_be_written(tmp_path):
    ledger = Ledger(tmp_path / "ledger", make_plan())
    setup = Setup(ledger=ledger)
    setup.clipper.write(weight=1.0)
    ledger.close()
    assert_refused(setup, "closed", LedgerError)


def test_a_noised_gradient_that_is_not_finite_stops_and_stays_charged():
    setup = Setup(dtype=torch.float16, noise_multiplier=1e8, expected_batch_size=1)
    with pytest.raises(DPFastError, match=r"weight \(torch\.float16\) is not finite"):
        setup.optimizer.step()
    assert setup.optimizer.steps_taken == 1
    assert not setup.update().any()
    assert all(p.grad is None for p in setup.model.parameters())


def test_resuming_takes_the_step_number_from_the_ledger(tmp_path):
    plan = make_plan()
    with Ledger(tmp_path / "ledger", plan) as ledger:
        setup = Setup(inner=torch.optim.Adam, ledger=ledger)
        setup.optimizer.step()
        state = copy.deepcopy(setup.optimizer.state_dict())
        setup.optimizer.step()
        setup.optimizer.step()
    with Ledger(tmp_path / "ledger", plan) as ledger:
        resumed = Setup(inner=torch.optim.Adam, ledger=ledger)
        resumed.optimizer.load_state_dict(state)
        assert resumed.optimizer.steps_taken == 3
        assert resumed.optimizer.state[resumed.model.weight]["step"] == 1
        resumed.optimizer.step()
        assert ledger.charged_steps == 4


def test_exponential_schedule():
    setup = Setup(**NO_NOISE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(setup.optimizer, gamma=0.5)
    for _ in range(2):
        setup.clipper.write(bias=20.0)
        setup.optimizer.step()
        schedule.step()
    assert torch.equal(setup.model.bias, torch.full((2,), -1.0 - 0.5))
    assert setup.optimizer.param_groups[0]["lr"] == 0.25


def test_one_cycle_schedule():
    setup = Setup(inner=torch.optim.Adam)
    schedule = torch.optim.lr_scheduler.OneCycleLR(setup.optimizer, max_lr=0.1, total_steps=10)
    rates, momenta = [], []
    for _ in range(9):
        setup.optimizer.step()
        schedule.step()
        rates.append(setup.optimizer.optimizer.param_groups[0]["lr"])
        momenta.append(setup.optimizer.param_groups[0]["betas"][0])
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] < 1e-4
    assert min(momenta) == pytest.approx(0.85)


def test_it_is_an_optimizer_and_shows_the_inner_one():
    setup = Setup()
    assert isinstance(setup.optimizer, torch.optim.Optimizer)
    assert setup.optimizer.defaults is setup.optimizer.optimizer.defaults
    assert "step 0 of 10" in repr(setup.optimizer)
    calls = []
    setup.optimizer.register_step_post_hook(lambda *_: calls.append(setup.optimizer.steps_taken))
    setup.optimizer.step()
    assert calls == [1]


def test_the_inner_optimizer_cannot_step_by_itself():
    setup = Setup()
    inner = setup.optimizer.optimizer
    with pytest.raises(PrivacyError, match=r"call DPOptimizer.step\(\) instead"):
        inner.step()
    setup.optimizer.step()  # within its own step it does
    again = DPOptimizer(inner, setup.optimizer.plan, setup.optimizer.clipper)
    again.step()
    with pytest.raises(PrivacyError, match=r"call DPOptimizer.step\(\) instead"):
        inner.step()


def test_noise_on_a_grid_is_whole_multiples_that_pay_for_rounding():
    """The released numbers times the batch size are multiples of the grid, and deviate as the wider clip norm asks."""
    setup = Setup(shape=(100, 100), dtype=torch.float64, noise="grid", expected_batch_size=16)
    scale, grid = setup.plan.noise_on(10_100)
    assert grid == 2.0**-30  # the largest power of two up to 2^-30 of the deviation, 1.5
    assert scale == 3.0 * (0.5 + grid * math.sqrt(10_100))
    setup.clipper.write(weight=0.3, bias=0.1)
    setup.optimizer.step()
    for p, total in ((setup.model.weight, 0.3), (setup.model.bias, 0.1)):
        numbers = -p.detach() * 16 / grid
        assert torch.equal(numbers, numbers.round())
        noise = numbers * grid - round(total / grid) * grid
        assert float(noise.std()) == pytest.approx(scale, rel=6 / math.sqrt(2 * p.numel()))
        assert stats.kstest((noise / scale).flatten().numpy(), "norm").pvalue > 1e-6


def test_a_grid_moves_no_epsilon_and_is_part_of_the_plan(tmp_path):
    plain, on_grid = make_plan(), make_plan(noise="grid")
    assert on_grid.epsilon() == plain.epsilon()
    assert plain.noise_on(10**8) == (1.5, 0.0)
    assert on_grid.noise_on(10**8)[0] < 1.5 * (1 + 1e-4)
    assert on_grid.fingerprint() != plain.fingerprint()
    assert Plan.from_dict(on_grid.to_dict()) == on_grid
    assert "noise" not in plain.to_dict()
    Ledger(tmp_path / "ledger.jsonl", on_grid).close()
    with pytest.raises(LedgerError):
        Ledger(tmp_path / "ledger.jsonl", plain)
    with pytest.raises(ConfigError, match='"gaussian" or "grid"'):
        make_plan(noise="discrete")
    assert make_plan(noise="grid", **NO_NOISE).noise_on(5) == (0.0, 0.0)


def test_neighbouring_sums_stay_within_what_a_grid_pays_for():
    """Rounded to the grid, sums that lie C apart may lie a little farther; the noise is for what they may."""
    plan = make_plan(noise="grid", noise_multiplier=1e-3)  # a coarse one: 2^-41, of sums around 1
    scale, grid = plan.noise_on(1000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one = torch.randn(1000, dtype=torch.float64, generator=generator)
        apart = torch.randn(1000, dtype=torch.float64, generator=generator)
        other = one + plan.max_grad_norm * apart / apart.norm()
        moved = ((one / grid).round() - (other / grid).round()).norm() * grid
        assert float(moved) <= scale / plan.noise_multiplier


def test_before_the_last_step_all_is_shown_again():
    model = nn.Linear(2, 1)
    clipper, plan = FakeClipper(model), make_plan(steps=3)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), plan, clipper)
    seen = []
    for _ in range(3):
        seen.append(clipper.shown_again)
        optimizer.step()
    assert seen == [0, 0, 1]
