"""Audits: canaries go through the real training and show a broken one; members and copies are told where there are."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from dpfast import Plan
from dpfast.audit import canaries
from dpfast.audit.canaries import audit, observe
from dpfast.audit.members import copies, loss_scores, membership, nearest
from dpfast.cli import app
from dpfast.data import ImageSet, real_digits
from dpfast.data.images import to_signed
from dpfast.errors import ConfigError, DataError
from dpfast.privacy import entropy, poisson_sample
from dpfast.testing import injected_entropy
from test_runs import TINY

SIGMA = 2.0


def objective(model, images, labels, keys):
    rows = to_signed(images).flatten(1).repeat_interleave(keys.augmult, 0)
    return cross_entropy(model(rows), labels.repeat_interleave(keys.augmult), reduction="none")


def observed(*, steps=20, canaries=300, augmult=2, rate=0.5, seed=0):
    torch.manual_seed(seed)
    data = real_digits("train")
    plan = Plan(
        dataset_size=len(data), expected_batch_size=rate * len(data), max_grad_norm=0.3, steps=steps,
        target_delta=1e-4, noise_multiplier=SIGMA,
    )  # fmt: skip
    return observe(
        nn.Linear(64, 10), data, plan, objective=objective, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        augmult=augmult, canaries=canaries, background=20, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    """With fixed entropy: a sound training looks wrong once in a hundred."""
    with injected_entropy(0):
        return observed()


def test_a_canary_that_is_there_moves_its_coordinate_by_the_clip_norm_when_it_is_drawn(seen):
    assert seen.sums.shape == (20, 300)
    assert 0.4 < seen.included.double().mean() < 0.6
    present, absent = seen.sums[:, seen.included], seen.sums[:, ~seen.included]
    error = 4 * math.sqrt((SIGMA**2 + 0.25) / present.numel())
    assert float(present.mean()) == pytest.approx(0.5, abs=error)  # each is drawn half of the time
    assert float(absent.mean()) == pytest.approx(0.0, abs=error)
    assert float(present.var()) == pytest.approx(SIGMA**2 + 0.25, rel=0.1)


def test_a_sound_training_is_not_refuted_and_its_bounds_are_not_empty(seen):
    found = audit(seen)
    assert [finding.name for finding in found.findings if not finding.sound] == []
    assert 0 < found.training.epsilon < found.training_epsilon
    assert found.step_epsilon < found.training_epsilon


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        (lambda v, scale, divisor, grid: entropy_noised(v, scale / 8, divisor), {"epsilon", "standard deviation"}),
        (lambda v, scale, divisor, grid: v / divisor, {"epsilon", "standard deviation"}),
        (lambda v, scale, divisor, grid: (v + scale * always_the_same(v)) / divisor, {"correlation"}),
    ],
    ids=["an eighth of the noise", "no noise", "the same noise in every step"],
)
def test_broken_noise_is_found(broken, names, monkeypatch):
    monkeypatch.setattr("dpfast.optimizer.noised", broken)
    wrong = {finding.name for finding in audit(observed(steps=6)).findings if not finding.sound}
    for name in names:
        assert any(name in found for found in wrong)


def shuffled(size, rate):
    """Two halves, again and again."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    shuffled.calls += 1
    return order[: size // 2] if shuffled.calls % 2 else order[size // 2 :]


shuffled.calls = 0


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        (lambda size, rate: poisson_sample(size, 1.2 * rate), {"were drawn, over the planned"}),
        (shuffled, {"how often a step drew", "how often a canary was drawn"}),
        (lambda size, rate: poisson_sample(size, rate).repeat(3), {"what a drawn canary adds"}),
    ],
    ids=["a higher rate", "halves in turns", "every example three times"],
)
def test_broken_sampling_is_found(sample, names, monkeypatch):
    monkeypatch.setattr("dpfast.trainer.poisson_sample", sample)
    wrong = {finding.name for finding in audit(observed()).findings if not finding.sound}
    for name in names:
        assert any(name in found for found in wrong)


def test_what_was_drawn_is_what_was_sampled(monkeypatch):
    """Padding, and the examples on which the objective is shown, count for nobody."""
    samples = []
    monkeypatch.setattr("dpfast.trainer.poisson_sample", lambda *of: samples.append(poisson_sample(*of)) or samples[-1])
    seen = observed(steps=5, canaries=20)
    numbers = torch.cat([torch.full((20,), -1), seen.included.nonzero().flatten()])  # behind the background
    assert seen.drawn.sum() > 0
    for drawn, sample in zip(seen.drawn, samples, strict=True):
        assert drawn.nonzero().flatten().tolist() == [n for n in numbers[sample].tolist() if n >= 0]


def test_the_spread_of_few_draws_is_not_judged(seen):
    """How often a canary is drawn in six steps is told by no gamma distribution."""
    for found, judged in ((seen, ["a step drew", "a canary was drawn"]), (observed(steps=6), ["a step drew"])):
        spreads = [finding.name for finding in audit(found).sampling if "spread" in finding.name]
        assert spreads == [f"spread of how often {of}, over the planned" for of in judged]


entropy_noised = entropy.noised


def always_the_same(values):
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(3))


def test_the_audited_plan_has_the_mechanism_of_the_recipe():
    plan = Plan(
        dataset_size=100, expected_batch_size=10, max_grad_norm=0.5, steps=3, target_delta=1e-3, target_epsilon=2.0,
        noise="grid", neighboring="replace",
    )  # fmt: skip
    audited = canaries._with_size(plan, 40)
    same = ("max_grad_norm", "steps", "target_delta", "noise_multiplier", "noise", "sample_rate")
    assert [getattr(audited, name) for name in same] == [getattr(plan, name) for name in same]
    assert (audited.dataset_size, audited.neighboring) == (40, "add_remove")


def test_an_audit_needs_canaries_and_noise():
    with pytest.raises(ConfigError, match="20 or more"):
        observed(canaries=10)


# Members


def test_membership_against_the_definition():
    random = np.random.default_rng(0)
    inside, outside = random.standard_normal(300) + 1, random.standard_normal(500)
    found = membership(torch.tensor(inside), torch.tensor(outside))
    assert found.auroc == pytest.approx((inside[:, None] > outside[None]).mean())
    threshold = np.sort(outside)[-6]  # 5 of 500 above: 1% false
    assert found.true_positives[0][0] == pytest.approx((inside > threshold).mean())
    assert found.true_positives[1][0] == pytest.approx((inside > outside.max()).mean())  # none above: less than 0.1%
    assert found.true_positives[0][0] < found.true_positives[0][1] < 1
    assert 0.01 < found.auroc_error < 0.03


def test_scores_that_are_all_alike_tell_nobody():
    found = membership(torch.zeros(50), torch.zeros(40))
    assert found.auroc == 0.5
    assert found.true_positives[0][0] == 0
    with pytest.raises(DataError, match="finite"):
        membership(torch.tensor([math.nan, 1.0]), torch.zeros(5))


def test_an_overfitted_model_betrays_its_members():
    torch.manual_seed(0)
    data = real_digits("train")
    members, others = data.select(range(40)), data.select(range(40, 240))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(to_signed(members.images).flatten(1)), members.labels).backward()
        optimizer.step()
    inside, outside = (loss_scores(model, objective, images, rows=2) for images in (members, others))
    assert inside.shape == (40,)
    assert membership(inside, outside).auroc > 0.8


def test_nearest_against_all_distances():
    torch.manual_seed(0)
    images, reference = (torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8) for n in (23, 41))
    every = torch.cdist(*(to_signed(x).flatten(1).double() for x in (images, reference)))
    for block in (7, 64):
        distances, numbers = nearest(images, reference, block=block)
        assert torch.equal(numbers, every.argmin(1))
        torch.testing.assert_close(distances, every.min(1).values)


def test_copies_are_found_and_paired():
    """In a random order: scans of one writer follow each other."""
    data = real_digits("train")
    data = data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(1)))
    members, others = data.select(range(300)), data.select(range(300, 500))
    free = data.select(range(500, 700))
    assert copies(free, members, others).nearer_limits[0] < 0.5 < copies(free, members, others).nearer_limits[1]
    copied = ImageSet(members.images[:100].clone(), members.labels[:100], members.classes)
    found = copies(copied, members, others)
    assert found.nearer_limits[0] > 0.5
    assert all(sample == member for sample, member in found.pairs)
    assert found.distances == (0.0,) * 12


# The command


def test_the_command_attacks_a_recipe_and_what_its_run_has_made(tmp_path):
    """With fixed entropy: a sound training looks wrong now and then."""
    flags = [part for setting in TINY for part in ("--set", setting)] + ["--runs", str(tmp_path)]
    small = ["--canaries", "40", "--background", "20"]
    with injected_entropy(0):
        first = CliRunner().invoke(app, ["audit", "digits", *flags, *small])
    assert first.exit_code == 0, first.output
    assert "Nothing refutes the claim" in first.stdout
    assert (tmp_path / "tiny" / "internal" / "DO_NOT_RELEASE.txt").exists()
    folder = tmp_path / "tiny" / "internal" / "audit"
    assert json.loads((folder / "audit.json").read_text())["model"] is None
    assert CliRunner().invoke(app, ["sample", "digits", *flags]).exit_code == 0
    with injected_entropy(0):
        assert CliRunner().invoke(app, ["audit", "digits", *flags, *small]).exit_code == 0
    found = json.loads((folder / "audit.json").read_text())
    assert found["model"]["members"] == 1437
    assert found["samples"]["others"] == 360
    page = (folder / "report.html").read_text()
    for said in ("contains private data, do not release", "Who took part", "Copies"):
        assert said in page


def test_a_run_without_noise_promises_nothing_to_audit(tmp_path):
    flags = [part for setting in (*TINY, "target_epsilon=inf") for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["audit", "digits", *flags, "--runs", str(tmp_path)])
    assert result.exit_code == 2
    assert "without noise nothing is promised" in result.output
