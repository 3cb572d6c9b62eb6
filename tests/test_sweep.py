"""Sweeps: settings compared on samples, chosen without touching private images or by a draw that the ledger holds."""

import json
import re

import pytest
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.errors import BudgetExhausted, ConfigError
from dpfast.privacy import read_ledger
from dpfast.recipes import load
from dpfast.report.sweep import SweepReport
from dpfast.runs import sweep as module
from dpfast.runs.sweep import sweep, variants
from test_runs import TINY, Recorder

SMALL = (*TINY, "sample.count=120", "shard_size=60", "private.choices=2", "choice_noise=20.0")
STEPS = {"evaluate.steps": ["2", "3"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def first(runs):
    """Of classifiers and samples, by the command."""
    flags = [part for setting in SMALL for part in ("--set", setting)]
    vary = ["--vary", "evaluate.steps=2,3", "--vary", "guidance=1.0,1.5"]
    result = CliRunner().invoke(app, ["sweep", "digits", "--runs", str(runs), *flags, *vary])
    assert result.exit_code == 0, result.output
    return result.stdout


def ledger(runs):
    return read_ledger(runs / "tiny/state/train/ledger.jsonl")


def test_the_command_ranks_on_samples_and_says_how_to_go_on(first, runs):
    kept = json.loads((runs / "tiny/internal/sweep/sweep.json").read_text())
    assert len(kept["settings"]) == 4
    assert kept["synthetic"][kept["settings"].index(kept["chosen"])] == max(kept["synthetic"])
    assert "--set " + kept["chosen"].replace(" ", " --set ") in first
    shown = [float(value) for value in re.findall(r"(\d+\.\d)%", first)]
    assert shown == sorted((round(100 * value, 1) for value in kept["synthetic"]), reverse=True)
    assert (runs / "tiny/internal/sweep/report.html").read_text().count("contains private data, do not release") == 1


def test_choosing_on_samples_spends_nothing(first, runs):
    assert ledger(runs).charged_steps == 4
    assert ledger(runs).draws == 0


def test_what_was_measured_is_not_measured_again(first, runs, monkeypatch):
    monkeypatch.setattr(module, "train_classifier", None)
    monkeypatch.setattr(module, "draw_samples", None)
    found = sweep(load("digits", SMALL), variants("digits", SMALL, STEPS), runs, Recorder())
    assert found.settings == ("evaluate.steps=2", "evaluate.steps=3")
    assert len(found.synthetic) == 2


def test_samples_of_a_setting_are_other_images_than_those_it_is_scored_on(first, runs):
    from dpfast.data.shards import load_shards

    own = load_shards(runs / "tiny/release/samples").images
    (drawn,) = (runs / "tiny/state/sweep").iterdir()
    assert not (own[:, None] == load_shards(drawn).images[None]).flatten(2).all(2).any()


def test_a_noised_choice_is_drawn_once_and_charged_before(first, runs):
    recipe, compared = load("digits", SMALL), variants("digits", SMALL, STEPS)
    found = sweep(recipe, compared, runs, Recorder(), noised=True)
    assert ledger(runs).draws == 1
    assert ledger(runs).plan.other_releases[0].noise_multiplier == pytest.approx(20.0 / 2**0.5)
    assert found.chosen == found.settings[max((0, 1), key=lambda i: found.noised_counts[i])]
    assert all(count != round(count) for count in found.noised_counts)
    assert sweep(recipe, compared, runs, Recorder(), noised=True).noised_counts == found.noised_counts
    assert ledger(runs).draws == 1
    others = variants("digits", SMALL, {"evaluate.steps": ["2", "4"]})
    with pytest.raises(BudgetExhausted, match="all planned draws"):
        sweep(recipe, others, runs, Recorder(), noised=True)


def test_a_noised_choice_pays_with_more_noise_in_training():
    from dpfast.runs import build

    plain = build.plan(load("digits", TINY), 1437)
    planned = build.plan(load("digits", SMALL), 1437)
    assert planned.noise_multiplier > plain.noise_multiplier
    assert planned.epsilon() <= 1
    assert build.baseline_plan(load("digits", SMALL), 1437).other_releases == ()


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        ({"private.augmult": ["1", "2"]}, "private.augmult means another training"),
        ({"widths": ["[8,8]", "[16,16]"]}, "model.widths means another training"),
        ({"seed": ["0", "1"]}, "another seed means"),
        ({"extractor_steps": ["2", "3"]}, "expected settings that differ"),
    ],
)
def test_what_would_train_privately_or_differs_in_nothing_is_refused(varied, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sweep(load("digits", TINY), variants("digits", TINY, varied), tmp_path, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_a_noised_choice_that_was_not_planned_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"private.choices = 0.*--set private.choices=2"):
        sweep(load("digits", TINY), variants("digits", TINY, STEPS), tmp_path, Recorder(), noised=True)


def test_the_page_shows_whether_ranks_agree():
    values = [0.5 + i / 30 for i in range(12)]
    page = SweepReport(
        name="test", settings=[f"steps={i}" for i in range(12)], synthetic=values, real=values,
        chosen="steps=11", noised_counts=None, held_out=100, test_images=360,
    )  # fmt: skip
    text = page.html()
    assert "Do synthetic images rank as real ones do?" in text
    assert text.index("steps=11</td>") < text.index("steps=0</td>")
