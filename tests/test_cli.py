"""The command line: help with examples, errors without tracebacks, what costs are announced."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dpfast import cli
from test_runs import TINY

COMMANDS = ("demo", "run", "pretrain", "train", "sample", "evaluate", "account", "plan", "bench", "doctor")


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def settings():
    return [part for setting in TINY for part in ("--set", setting)]


def test_help_is_quick_and_light(tmp_path):
    code = "import sys, dpfast.cli; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    text = call(command, "--help").output
    assert "Examples:" in text
    assert f"dpfast {command}" in text


def test_all_commands_are_listed():
    text = call("--help").output
    assert [command for command in COMMANDS if command not in text] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "digitz"), "nearest: 'digits'"),
        (("run", "digits", "--set", "augmlt=3"), "private.augmult"),
        (("plan", "digits", "--set", "private.steps=no"), "whole number"),
        (("run", "digits", "--dry-run", "--set", "performance.device=nowhere"), "performance.device"),
        (("account", "--steps", "5", "--delta", "1e-5", "--sample-rate", "0.1"), "exactly one"),
        (("account", "--steps", "5", "--delta", "1e-5", "--epsilon", "1"), "--sample-rate"),
        (("account", "--steps", "5", "--delta", "1e-5", "--sample-rate", "2", "--epsilon", "1"), "at most 1"),
    ],
)
def test_errors_are_a_few_lines_and_exit_code_two(arguments, said):
    result = call(*arguments, code=2)
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("words", [("target_epsilon", "1"), ("target_epsilon", "=", "1")])
@pytest.mark.parametrize("command", [("run", "digits"), ("plan", "digits"), ("demo",)])
def test_a_setting_without_its_sign_says_how_it_is_written(command, words):
    assert "expected key=value, got 'target_epsilon'" in " ".join(
        call(*command, "--set", *words, code=2).stderr.split()
    )


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli.app, ["run", "digitz", "--debug"])
    assert type(result.exception).__name__ == "ConfigError"


def test_ctrl_c_says_how_to_go_on(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_execute", interrupted)
    assert "interrupted; run the same command to go on" in call("demo", code=130).stderr


def test_an_error_of_the_operating_system_is_a_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    said = call("run", "digits", "--runs", str(tmp_path / "file" / "runs"), code=2).stderr
    assert "Not a directory" in said
    assert "Traceback" not in said


@pytest.mark.filterwarnings("default")
def test_delta_too_large_is_a_warning_of_one_line():
    result = call("plan", "digits", "--set", "target_delta=1e-2", "--set", "target_epsilon=1")
    assert "warning: target_delta=0.01 is not below 1/dataset_size" in result.stderr
    assert ".py" not in result.stderr


def test_account_and_its_inverse_agree():
    common = ("--steps", "80", "--delta", "1e-4")
    found = call("account", "--sample-rate", "0.25", *common, "--epsilon", "10").output
    sigma = dict(line.split("  ", 1) for line in found.splitlines())["noise multiplier"].strip()
    assert 1.23 < float(sigma) < 1.24
    back = call("account", "--batch-size", "25", "--dataset-size", "100", *common, "--noise-multiplier", sigma).output
    assert 9.9 < float(dict(line.split(None, 1) for line in back.splitlines())["epsilon"]) <= 10


def test_bench_shows_time_and_memory_beside_the_ordinary_step():
    smaller = ("--set", "private.augmult=2", "--set", "performance.microbatch=4", "--rounds", "2")
    text = call("bench", "digits", *smaller).output
    assert "4 images of 2 augmentations" in text
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
    assert rows["ordinary step"][1:3] == ["1.00", "1.00"]
    assert float(rows["private step"][1]) > 0
    assert {"all gram", "all direct", "all materialise"} <= rows.keys()


def test_plan_shows_the_noise_and_epsilon_by_step():
    text = call("plan", "digits", "--set", "target_epsilon=1").output
    for said in ("1437", "noise multiplier", "80: 1.00", "at delta 0.0001"):
        assert said in text


def test_dry_run_announces_the_cost_and_does_nothing(tmp_path):
    text = call("run", "digits", "--dry-run", "--runs", str(tmp_path), *settings()).output
    for said in ("[private]", "epsilon", "noise multiplier", "image passes", "time (estimate)", "memory (estimate)"):
        assert said in text
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_versions_device_and_disk(tmp_path):
    text = call("doctor", "--runs", str(tmp_path / "runs")).output
    for said in ("torch", "native module", "device", "threads", "GB"):
        assert said in text
