"""What the README shows works: its code, its commands, its table."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import snippets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    .venv/bin/dpfast ")]


def test_the_examples_run(tmp_path, monkeypatch) -> None:
    said = [printed for _, printed in snippets.run_page(ROOT / "README.md", tmp_path)]
    assert len(said) == len(EXAMPLES)
    assert sum(bool(line.strip()) for line in EXAMPLES[0].splitlines()) <= 15
    assert 7.9 < float(said[0].split()[1]) <= 8
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[1], "README.md", "exec"), {})  # the same script goes on where it stopped
    assert {"PRIVACY.md", "privacy.json", "model.pt", "samples"} <= {path.name for path in Path("release").iterdir()}
    assert 7.9 < json.loads(Path("release/privacy.json").read_text())["epsilon"] <= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line, tmp_path) -> None:
    from dpfast.cli import app

    words = shlex.split(line)[1:]
    # As the command, with steps that take less; tests/test_runs.py runs them for real.
    smaller = ["private.augmult=1", "private.sample_rate=0.05", "baseline.augmult=1", "baseline.sample_rate=0.05"]
    if words[0] in ("run", "bench"):
        words += [part for setting in smaller for part in ("--set", setting)]
        words += ["--rounds", "1"] if words[0] == "bench" else ["--runs", str(tmp_path)]
        words += ["--dry-run"] * (words[0] == "run" and "--dry-run" not in words)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_the_table_is_generated() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import digits, results
    finally:
        sys.path.remove(str(ROOT))
    (written,) = re.findall(r"<!-- digits: begin[^\n]*\n(.*?)\n<!-- digits: end", README, re.DOTALL)
    assert written == digits.table(results.rows("digits"))


def test_importing_dpfast_is_light() -> None:
    code = "import sys, dpfast; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules); print(*dir(dpfast))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.sep)
    for name in ("DPOptimizer", "DPTrainer", "GhostClipper", "Performance", "Plan"):
        assert name in done.stdout.split()


def test_public_names_exist() -> None:
    import dpfast

    for name in dpfast.__all__:
        assert getattr(dpfast, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'GhostCliper'"):
        dpfast.GhostCliper  # noqa: B018


def test_every_claim_of_the_guarantee_names_tests_that_exist():
    claims = (ROOT / "docs/guarantee.md").read_text().split("\n## Claims and their tests\n")[1].split("\n## ")[0]
    rows = [line for line in claims.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        claim, shown = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", shown)
        assert named, claim
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), (claim, test)
