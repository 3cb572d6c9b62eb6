"""What a plan says beforehand, and what a step then does."""

import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn

from cases import losses, unet, unet_inputs
from dpfast import GhostClipper, Performance
from dpfast.bench import bench
from dpfast.clipping import plan_step
from dpfast.clipping.accumulate import Accumulation
from dpfast.clipping.planner import Meter, StepPlan
from dpfast.errors import CaptureError
from dpfast.kernels import cost, rates
from dpfast.kernels.cost import Work
from dpfast.kernels.rates import USUAL
from dpfast.measure import peak_storages

WIDE = {"sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}


def unet_losses(model, *inputs):
    return losses(model, inputs)


def wide_unet(rows: int):
    torch.manual_seed(0)
    _, *rest = unet_inputs(rows)
    return unet(**WIDE), (torch.randn(rows, 1, 16, 16), *rest)


def private_step(model, inputs, augmult: int, performance: Performance):
    clipper = GhostClipper(model, max_grad_norm=0.1, augmult=augmult, performance=performance)

    def step() -> None:
        clipper.zero_grad()
        with clipper:
            clipper.backward(losses(model, inputs))

    return step


@pytest.mark.parametrize("form", ["auto", "gram", "direct", "materialise"])
@pytest.mark.parametrize(("examples", "augmult"), [(12, 1), (3, 4), (2, 1)])
def test_predicted_memory(examples: int, augmult: int, form) -> None:
    """Within a tenth of what the allocator sees, for the private and for the ordinary step."""
    model, inputs = wide_unet(examples * augmult)
    performance = Performance(form=form)
    plan = plan_step(model, unet_losses, inputs, augmult=augmult, performance=performance)

    def ordinary() -> None:
        model.zero_grad()
        losses(model, inputs).mean().backward()

    private = private_step(model, inputs, augmult, performance)
    for step, planned in ((private, plan.showing), (private, plan.private), (ordinary, plan.ordinary)):
        model.zero_grad()
        assert planned.peak == pytest.approx(peak_storages(step), rel=0.1)
    assert all(p.grad is None or type(p.grad) is torch.Tensor for p in model.parameters())


def test_a_peak_is_the_same_whatever_was_measured_before() -> None:
    """What a step releases of an earlier one is no memory that it holds less."""
    kept = [torch.zeros(0)]

    def step() -> None:
        kept[0] = torch.zeros(0)
        kept[0] = torch.ones(1000) + torch.ones(1000)

    assert [peak_storages(step) for _ in range(3)] == [3 * 4000] * 3


def test_a_plan_chooses_what_the_step_chooses(monkeypatch) -> None:
    model, inputs = wide_unet(6)
    chosen, finish = [], Accumulation.finish

    def noting(self, *args):
        chosen.append({name: form for name, _, form in self.chosen})
        return finish(self, *args)

    monkeypatch.setattr(Accumulation, "finish", noting)
    plan = plan_step(model, unet_losses, inputs, augmult=2)
    private_step(model, inputs, 2, Performance())()
    assert len(chosen) == 3  # two of them are planned: a step like most, and one that shows that examples stay apart
    planned, showing, run = chosen
    assert planned == showing == run == {layer.name: layer.form for layer in plan.layers}
    stored = [p for name, p in model.named_parameters() if name not in run]
    assert (plan.small, plan.small_bytes) == (len(stored), 3 * 4 * sum(p.numel() for p in stored))


def test_a_plan_as_a_table() -> None:
    model, inputs = wide_unet(4)
    text = str(plan_step(model, unet_losses, inputs))
    assert "conv_in.weight" in text
    assert "16x1x3x3" in text
    for line in ("private step", "ordinary step", "biases, affines", "one form for all: gram"):
        assert line in text


@pytest.fixture
def _usual_rates(monkeypatch):
    """Not those of this machine in this minute."""
    monkeypatch.setenv("DPFAST_PROFILE", "usual")
    rates.rates_of.cache_clear()
    yield
    rates.rates_of.cache_clear()


@pytest.mark.usefixtures("_usual_rates")
def test_forms_that_are_not_run_say_why(monkeypatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    step = (model, lambda model, x: model(x).square().sum(1), (torch.randn(4, 1, 6, 6),))

    monkeypatch.setattr("dpfast.bench.SLOW", 100)

    def reasons(**settings) -> dict[str, str | None]:
        return {m.name: m.skipped for m in bench(*step, rounds=1, **settings)}

    peak = plan_step(*step, performance=Performance(form="gram")).peak
    enough, less = (reasons(performance=Performance(memory_budget=peak - few)) for few in (0, 1))
    assert {name: reason for name, reason in less.items() if reason != enough[name]} == {
        "all gram": f"predicted {peak / 1e6:,.1f} MB, over the budget"
    }
    monkeypatch.setattr("dpfast.bench.SLOW", 0.5)
    slow = reasons()
    assert all(re.fullmatch(r"predicted [\d.]+ times", slow[f"all {form}"]) for form in cost.FORMS)


def test_what_cannot_be_planned_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) * (2 if x.sum().item() > 0 else 1)

    with pytest.raises(CaptureError, match=r"cannot be planned: it looks at numbers"):
        plan_step(Reads(), unet_losses, (torch.randn(4, 3),))
    with pytest.raises(CaptureError, match="batch_norm in training mode mixes the rows"):
        plan_step(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), unet_losses, (torch.randn(4, 3),))


# The choice of forms

WORKS = tuple(
    Work(
        examples=8,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        pixels=inputs // taps,
        taps=taps,
        held=32 * rows * outputs,
    )
    for rows, inputs, outputs, taps in ((64, 576, 64, 9), (16, 1152, 128, 9), (256, 144, 16, 9), (64, 128, 128, 1))
)


def total(forms) -> tuple[float, int]:
    costs = [cost.predict(work, form, USUAL) for work, form in zip(WORKS, forms, strict=True)]
    return sum(c.seconds for c in costs), sum(c.kept for c in costs)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_the_price_of_a_budget_against_all_choices(share: float) -> None:
    """No choice that keeps as little is predicted to be faster."""
    every = [total(forms) for forms in itertools.product(cost.FORMS, repeat=len(WORKS))]
    least, most = min(kept for _, kept in every), max(kept for _, kept in every)
    budget = int(least + share * (most - least))
    price = cost.price_within(WORKS, USUAL, 0.0, budget)
    seconds, kept = total([cost.choose(work, USUAL, price) for work in WORKS])
    assert kept <= budget
    assert seconds <= min(s for s, k in every if k <= kept) * (1 + 1e-9)


def test_products_of_bfloat16_have_their_own_rate() -> None:
    rates = dataclasses.replace(USUAL, brain=2 * USUAL.product)
    low, once = dataclasses.replace(WORKS[0], brain=True), WORKS[0].products / USUAL.product
    for form, times in (("materialise", 1), ("direct", 2)):
        saved = cost.predict(WORKS[0], form, rates).seconds - cost.predict(low, form, rates).seconds
        assert saved == pytest.approx(times * once / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_knows_which_products_are_of_bfloat16(dtype, monkeypatch) -> None:
    of_brain = set()
    monkeypatch.setattr(cost, "choose", lambda work, *_: of_brain.add(work.brain) or "materialise")
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))

    def rows(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(x).float().square().sum(1)

    plan_step(model, rows, (torch.randn(4, 1, 4, 4),))
    assert of_brain == {dtype == torch.bfloat16}


def test_a_budget_that_nothing_fits_takes_the_leanest_forms() -> None:
    price = cost.price_within(WORKS, USUAL, 0.0, 1)
    assert total([cost.choose(work, USUAL, price) for work in WORKS])[1] == min(
        total(forms)[1] for forms in itertools.product(cost.FORMS, repeat=len(WORKS))
    )


@pytest.mark.usefixtures("_usual_rates")
def test_steps_keep_to_the_budget_and_spend_it(monkeypatch) -> None:
    """The first step fills the budget as gradients come; later ones know all works, and are predicted no slower."""
    model, inputs = wide_unet(32)
    steps, total_kept, finish = [], [], Accumulation.finish

    def noting(self, *args):
        costs = [cost.predict(work, form, USUAL) for _, work, form in self.chosen]
        works = [work for _, work, _ in self.chosen]
        total_kept.append(sum(min(cost.predict(work, f, USUAL).kept for f in cost.FORMS) for work in works))
        steps.append((sum(c.seconds for c in costs), sum(c.kept for c in costs), self.stored_bytes))
        return finish(self, *args)

    monkeypatch.setattr(Accumulation, "finish", noting)
    private_step(model, inputs, 1, Performance())()
    unbounded, leanest = steps.pop(), min(total_kept)
    budget = (unbounded[1] + leanest) // 2
    step = private_step(model, inputs, 1, Performance(memory_budget=budget))
    for _ in range(3):
        step()
    greedy, known, again = steps
    assert greedy[2] <= budget
    assert known[1] <= budget
    assert known == again
    assert unbounded[0] <= known[0]
    assert known[0] <= greedy[0] or greedy[1] > budget  # which counts what is stored, not the factors that are kept


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DPFAST_PROFILE", raising=False)
    calls = []
    monkeypatch.setattr(rates, "measure", lambda: calls.append(1) or dataclasses.replace(USUAL, call=0.5))
    for _ in range(2):
        rates.rates_of.cache_clear()
        assert rates.rates_of("cpu").call == 0.5
    rates.profile_path().write_text("{}")  # of another version
    rates.rates_of.cache_clear()
    assert rates.rates_of("cpu").call == 0.5
    rates.rates_of.cache_clear()
    assert len(calls) == 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_flops_of_grouped_convolutions(groups, transposed) -> None:
    """A backward pass has twice the products of the forward pass."""
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = make(8, 16, 3, groups=groups), torch.randn(2, 8, 6, 5, requires_grad=True)
    with Meter([]) as forward:
        out = layer(x)
    with Meter([]) as backward:
        out.sum().backward()
    assert 2 * forward.flops == backward.flops > 0


def test_grouped_and_half_precision_layers_have_rates_of_their_own() -> None:
    def planned(dtype, groups) -> StepPlan:
        model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.SiLU(), nn.Conv2d(64, 64, 3, groups=groups))

        def rows(model, x):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model(x).float().square().flatten(1).mean(1)

        return plan_step(model, rows, (torch.randn(64, 8, 20, 20),), augmult=8, device="h200")

    whole, parts = planned(torch.bfloat16, 1), planned(torch.bfloat16, 64)
    assert parts.layers[1].costs["direct"].seconds > whole.layers[1].costs["direct"].seconds / 8  # no tile is full
    low, wide = (planned(dtype, 1).private.working for dtype in (torch.float16, torch.float32))
    assert low == pytest.approx(whole.private.working)
    assert low < wide


def test_norms_under_autocast_are_of_float32_on_a_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3))

    def rows(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().flatten(1).mean(1)

    inputs = (torch.randn(8, 8, 12, 12),)
    here, there = (plan_step(model, rows, inputs, device=device) for device in (None, "h200"))
    assert there.ordinary.peak > here.ordinary.peak
    assert all(layer.costs["direct"].kept == other.costs["direct"].kept for layer, other in
               zip(here.layers, there.layers, strict=True))  # fmt: skip
