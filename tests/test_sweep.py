"""Sweeps: settings compared on samples, chosen without touching private images or by a draw that the ledger holds."""

import json
import re

import pytest
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.data.shards import load_shards
from dpfast.errors import BudgetExhausted, ConfigError, FileError
from dpfast.evaluation import studies
from dpfast.privacy import read_ledger
from dpfast.recipes import load
from dpfast.report.sweep import SweepReport
from dpfast.runs.sweep import sweep, variants
from test_runs import TINY, Recorder

SMALL = (*TINY, "sample.count=120", "shard_size=60", "private.choices=3", "choice_noise=25.0")
STEPS = {"evaluate.steps": ["2", "3", "4"]}
GUIDANCE = {"guidance": ["1.0", "1.5", "2.0"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def first(runs):
    """Of classifiers, by the command."""
    flags = [part for setting in SMALL for part in ("--set", setting)]
    vary = ["--vary", "evaluate.steps=2,3", "--vary", "network=small-cnn,wrn-16-1"]
    result = CliRunner().invoke(app, ["sweep", "digits", "--runs", str(runs), *flags, *vary])
    assert result.exit_code == 0, result.output
    return result.stdout


def ledger(runs):
    return read_ledger(runs / "tiny/state/train/ledger.jsonl")


def compare(runs, varied, **options):
    return sweep(load("digits", SMALL), variants("digits", SMALL, varied), runs, Recorder(), **options)


def test_the_command_ranks_on_samples_and_says_how_to_go_on(first, runs):
    kept = json.loads((runs / "tiny/internal/sweep/sweep.json").read_text())
    assert len(kept["settings"]) == 4
    assert kept["synthetic"][kept["settings"].index(kept["chosen"])] == max(kept["synthetic"])
    assert "--set " + kept["chosen"].replace(" ", " --set ") in first
    shown = [float(value) for value in re.findall(r"(\d+\.\d)%", first)]
    assert shown == sorted((round(100 * value, 1) for value in kept["synthetic"]), reverse=True)
    assert (runs / "tiny/internal/sweep/report.html").read_text().count("contains private data, do not release") == 1


def test_choosing_on_samples_spends_nothing_and_reads_no_private_image(first, runs):
    assert ledger(runs).charged_steps == 4
    assert ledger(runs).draws == 0
    (kept,) = (runs / "tiny/internal/sweep/results").iterdir()
    assert {key.split(".")[-2] for key in json.loads(kept.read_text())} == {"synthetic", "real"}
    assert not (runs / "tiny/internal/sweep/unprotected").exists()


def test_what_was_measured_is_not_measured_again(first, runs, monkeypatch):
    monkeypatch.setattr(studies, "train_classifier", None)
    found = compare(runs, {"evaluate.steps": ["3", "2"]})
    assert found.settings == ("evaluate.steps=3", "evaluate.steps=2")
    assert len(found.synthetic) == 2


def test_a_noised_choice_is_drawn_once_and_charged_before(first, runs, monkeypatch):
    """Of settings of sampling, whose samples are all other images than the run's."""
    found = compare(runs, GUIDANCE, noised=True)
    assert ledger(runs).draws == 1
    assert ledger(runs).plan.other_releases[0].noise_multiplier == pytest.approx(25.0 / 3**0.5)
    assert found.chosen == found.settings[max(range(3), key=lambda i: found.noised_counts[i])]
    assert all(count != round(count) for count in found.noised_counts)
    assert not (runs / "tiny/internal/sweep/unprotected").exists()
    own = load_shards(runs / "tiny/release/samples").images
    drawn = [load_shards(folder).images for folder in (runs / "tiny/state/sweep").iterdir()]
    assert len(drawn) == 2
    for images in drawn:
        assert not (own[:, None] == images[None]).flatten(2).all(2).any()
    again = compare(runs, {"guidance": ["2.0", "1.5", "1.0"]}, noised=True)
    assert again.noised_counts == found.noised_counts[::-1]
    assert again.chosen == found.chosen
    assert ledger(runs).draws == 1
    kept = (runs / "tiny/internal/sweep/results").glob("*.json")  # of the second time: no private images
    assert {key.split(".")[-2] for path in kept for key in json.loads(path.read_text())} == {"synthetic", "real"}
    monkeypatch.setattr(studies, "train_classifier", None)  # refused before anything is trained
    with pytest.raises(BudgetExhausted, match="is spent, on other settings"):
        compare(runs, STEPS, noised=True)
    kept = runs / "tiny/internal/sweep/choices.json"
    kept.write_text("{")
    with pytest.raises(FileError, match="cannot be drawn again"):
        compare(runs, GUIDANCE, noised=True)


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
        ({"private.augmult": ["1", "2"]}, r"augmult=1: private.augmult cannot be compared.*a budget of its own"),
        ({"widths": ["[8,8]", "[16,16]"]}, "model.widths cannot be compared"),
        ({"seed": ["0", "1"]}, "seed cannot be compared"),
        ({"guidance": ["1.0", "2.0"]}, r"sample.guidance cannot be compared. Samples .* vouch .*--noised"),
        ({"extractor_steps": ["2", "3"]}, "expected settings that differ"),
        ({"evaluate.steps": ["2"]}, "two settings or more"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_done(varied, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sweep(load("digits", SMALL), variants("digits", SMALL, varied), tmp_path, Recorder())
    with pytest.raises(ConfigError, match="a twelfth is held out"):
        sweep(load("digits", TINY), variants("digits", TINY, STEPS), tmp_path, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_varied_once():
    result = CliRunner().invoke(app, ["sweep", "digits", "--vary", "evaluate.steps=2", "--vary", "evaluate.steps=3"])
    assert result.exit_code == 2
    assert "--vary evaluate.steps: given twice" in result.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["private.choices=0"], r"private.choices = 0.*--set private.choices=3"),
        (["private.choices=4"], "private.choices = 4"),
        (["target_epsilon=inf"], "a run without noise has none"),
        (["choice_noise=1.0"], "private.choice_noise = 1: .* costs less"),
        (["private.choices=1"], "0, or a number of at least 2"),
    ],
)
def test_a_noised_choice_that_is_not_planned_is_refused(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sweep(
            load("digits", [*SMALL, *changes]), variants("digits", [*SMALL, *changes], STEPS), tmp_path, Recorder(),
            noised=True,
        )  # fmt: skip


def test_the_page_shows_whether_ranks_agree():
    values = [0.5 + i / 30 for i in range(12)]
    page = SweepReport(
        name="test", settings=[f"steps={i}" for i in range(12)], synthetic=values, real=values,
        chosen="steps=11", noised_counts=None, held_out=100, test_images=360,
    )  # fmt: skip
    text = page.html()
    assert "Do synthetic images rank as real ones do?" in text
    assert text.index("steps=11</td>") < text.index("steps=0</td>")
