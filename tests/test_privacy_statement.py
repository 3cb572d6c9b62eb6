"""The privacy statement says everything, in words and as JSON, and never promises too much."""

import json
import math

import pytest

from dpfast.errors import FileError
from dpfast.privacy import GaussianRelease, Ledger, Plan, PrivacyStatement, read_ledger
from dpfast.testing import injected_entropy

WORDS = {
    "augmult": 4,
    "public": ["The number of training images, 1437.", "The names of the classes."],
    "not_accounted": ["Hyperparameters were chosen on folds of the training images."],
}


def make_plan(**changes):
    values = {
        "dataset_size": 1437,
        "expected_batch_size": 359.25,
        "max_grad_norm": 0.5,
        "steps": 5,
        "target_delta": 1e-4,
        "noise_multiplier": 1.238,
    }
    if "target_epsilon" in changes:
        del values["noise_multiplier"]
    return Plan(**{**values, **changes})


def make(plan, charged=5, **changes):
    with Ledger(None, plan) as ledger:
        for step in range(1, charged + 1):
            ledger.charge(step)
        return PrivacyStatement.of(ledger, **{**WORDS, **changes})


def test_every_item_is_there():
    plan = make_plan(other_releases=[GaussianRelease(description="class histogram", noise_multiplier=20.0)])
    text = make(plan).text()
    for item in (
        f"epsilon = {math.ceil(plan.epsilon() * 1000) / 1000:g}",
        "delta = 0.0001",
        "add/remove: two data sets are neighbours when one has one image more",
        "privacy loss distributions (dp-accounting",
        "Poisson: a step takes each image independently, with chance 0.25",
        "5 spent of 5 planned",
        "1.238 (noise standard deviation / clip norm)",
        "clip norm | 0.5",
        "4 per image and step",
        "class histogram (1 x, noise multiplier 20)",
        plan.fingerprint(),
        "with n images in the data has n times epsilon",
        *WORDS["public"],
        *WORDS["not_accounted"],
        "times rounded to minutes",
        "Box-Muller",
        "Mironov 2012",
    ):
        assert item in text, item
    assert "NOT PRIVATE" not in text
    assert "UNSAFE" not in text


@pytest.mark.parametrize("plan", [{}, {"neighboring": "replace"}, {"target_epsilon": math.inf}])
def test_an_example_is_called_what_it_is(plan):
    """Also where nothing is promised, or what was shown is said first."""
    words = {"public": ["The number."], "not_accounted": ["Nothing."], "augmult": 1}
    statement = make(make_plan(**plan), example="signal", **words)
    for text in (statement.text(), json.dumps(statement.to_dict())):
        assert "image" not in text
        assert "every signal sampled from it" in text.lower()
    assert "The model and all texts" in make(make_plan(), example="text", subject="the model and all texts").text()


def test_the_json_holds_the_same(tmp_path):
    plan = make_plan()
    make(plan).write(tmp_path)
    values = json.loads((tmp_path / "privacy.json").read_text())
    expected = {
        "epsilon": plan.epsilon(),
        "delta": 1e-4,
        "neighboring": "add_remove",
        "steps_planned": 5,
        "steps_charged": 5,
        "noise_multiplier": 1.238,
        "max_grad_norm": 0.5,
        "augmult": 4,
        "public": WORDS["public"],
        "not_accounted": WORDS["not_accounted"],
        "test_entropy": False,
        "unsafe_debug": False,
    }
    assert {name: values[name] for name in expected} == expected
    assert (tmp_path / "PRIVACY.md").read_text() == make(plan).text()


def test_it_states_what_was_spent_not_what_was_planned(tmp_path):
    plan = make_plan()
    with Ledger(tmp_path / "ledger", plan) as ledger:
        ledger.charge(1)
        ledger.charge(2)
    statement = PrivacyStatement.of(read_ledger(tmp_path / "ledger"), **WORDS)
    assert statement.epsilon == plan.epsilon(2) < plan.epsilon()
    assert "2 spent of 5 planned" in statement.text()


def test_epsilon_is_rounded_up():
    statement = make(make_plan())
    shown = float(statement.text().split("epsilon = ")[1].split(",")[0])
    assert statement.epsilon <= shown < statement.epsilon + 1e-3


def test_the_odds_are_those_of_the_privacy_curve():
    plan = make_plan()
    percent = math.ceil(100 * plan.membership_accuracy())
    assert 50 < percent < 100
    certain = make_plan(noise_multiplier=0.1, expected_batch_size=1437)
    assert f"right at most {percent} times in 100" in make(plan).text()
    assert "no limit on right guesses can be proven" in make(certain).text()


def test_replace_is_explained():
    text = make(make_plan(neighboring="replace")).text()
    assert "one image of one is exchanged for another image" in text
    assert "which of two given images was used in training" in text


@pytest.mark.parametrize("charged", [0, 5])
def test_without_noise_it_says_so_first(charged, tmp_path):
    statement = make(make_plan(target_epsilon=math.inf), charged=charged)
    assert statement.text().splitlines()[2].startswith("**NOT PRIVATE.**")
    assert not statement.is_private
    statement.write(tmp_path)
    values = json.loads((tmp_path / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert values["verdict"] == "NOT PRIVATE"
    assert values["epsilon"] == values["target_epsilon"] == "inf"


def test_test_entropy_is_said_first_even_after_it_ended():
    with injected_entropy(0):
        statement = make(make_plan())
    for text in (statement.text().splitlines()[2], statement.to_dict()["verdict"]):
        assert "TEST ENTROPY: no guarantee" in text
        assert "NOT PRIVATE" in text
    assert "differentially private with" not in statement.text()
    assert not statement.is_private


@pytest.mark.parametrize("changes", [{}, {"target_epsilon": math.inf}])
def test_unsafe_debug_is_said_first_beside_what_is_promised_otherwise(changes, tmp_path):
    plan = make_plan(**changes)
    for debug in (True, False):  # once marked, marked for good
        with Ledger(tmp_path / "ledger", plan, unsafe_debug=debug) as ledger:
            ledger.charge(ledger.charged_steps + 1)
    statement = PrivacyStatement.of(read_ledger(tmp_path / "ledger"), **WORDS)
    otherwise = "NOT PRIVATE" if changes else "differentially private with epsilon"
    shown = "UNSAFE DEBUG: un-noised values computed from private data were shown"
    assert statement.text().splitlines()[2].startswith(f"**{shown}")
    assert otherwise in statement.text().splitlines()[4]
    assert statement.to_dict()["verdict"].startswith(shown)
    assert otherwise in statement.to_dict()["verdict"]
    assert "epsilon covers neither whoever saw them" in statement.text()
    assert statement.unsafe_debug
    assert statement.is_private != bool(changes)


def test_a_failed_write_is_reported(tmp_path):
    (tmp_path / "release").write_text("a file, not a folder")
    with pytest.raises(FileError, match="cannot write"):
        make(make_plan()).write(tmp_path / "release")
