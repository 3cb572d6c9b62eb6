"""Of a whole run: nothing computed from private images without noise is anywhere but among the private files, unless
``unsafe_debug`` shows it, which every statement says.
"""

import io
import json
import re
import struct

import pytest
import torch
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.clipping.rule import ClipRule
from dpfast.diffusion.objective import DiffusionObjective
from dpfast.evaluation.classifier import ClassifierObjective
from dpfast.privacy import read_ledger
from dpfast.recipes import load
from dpfast.runs.pipeline import execute
from dpfast.runs.terminal import TerminalProgress
from test_runs import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, what it printed, and the norms, factors and losses of its private steps."""
    folder, seen = tmp_path_factory.mktemp("runs"), {"norms": [], "factors": [], "losses": []}
    factors = ClipRule.factors

    def watched(self, sq):
        result = factors(self, sq)
        seen["norms"] += sq.double().sqrt().tolist()
        seen["factors"] += result.double().tolist()
        return result

    def losses(objective):
        call = objective.__call__

        def kept(self, model, images, *rest):
            result = call(self, model, images, *rest)
            if type(result) is torch.Tensor and torch.is_grad_enabled():
                seen["losses"] += result.detach().double().tolist()
            return result

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipRule, "factors", watched)
        for objective in (DiffusionObjective, ClassifierObjective):
            patch.setattr(objective, "__call__", losses(objective))
        flags = [part for setting in TINY for part in ("--set", setting)]
        result = CliRunner().invoke(app, ["run", "digits", "--runs", str(folder), *flags])
    assert result.exit_code == 0, result.output
    return folder / "tiny", result.output, seen


def values(run):
    """All of them: those of the steps, and the unprotected figures of ``metrics.json``."""
    folder, _, seen = run
    metrics = json.loads((folder / "internal/metrics.json").read_text())
    scores = [value for of in metrics["scores"].values() for key, value in of.items() if key.split("_")[0] in SCORES]
    real = [metrics["accuracy"]["real"]]
    found = {"scores": scores, "real": real, **seen}
    assert all(len(of) > 0 for of in found.values())
    return {name: {x for x in of if x not in (0.0, 1.0)} for name, of in found.items()}


SCORES = ("fid", "kid", "precision", "recall", "density", "coverage")


def outside(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "internal" not in path.relative_to(folder).parts]


NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?")


def shown(text):
    """The numbers in a text that have five digits or more; shorter ones cannot be told from others. With each, how far
    what was rounded or cut off to it may lie from it: a unit of its last place, or what float32 rounds.
    """
    for match in NUMBER.finditer(text):
        number, _, power = match[0].lower().partition("e")
        digits = number.strip("-").replace(".", "").lstrip("0")
        if len(digits) >= 5:
            places = len(number.partition(".")[2]) - int(power or 0)
            value = float(match[0])
            yield value, max(10.0**-places, 2e-7 * abs(value))


def leaked(text, numbers):
    """Which of ``numbers`` are in the text."""
    ordered = torch.tensor(sorted(numbers), dtype=torch.float64)
    found = []
    for value, tolerance in shown(text):
        at = torch.searchsorted(ordered, torch.tensor(value - tolerance, dtype=torch.float64))
        if at < len(ordered) and ordered[at] <= value + tolerance:
            found.append(value)
    return found


def test_no_text_outside_holds_them(run):
    folder, output, _ = run
    texts = {"terminal": output}
    for path in outside(folder):
        if path.suffix in (".json", ".jsonl", ".md", ".html", ".toml", ".txt"):
            texts[str(path)] = re.sub(r"base64,[^\"]+|<svg .*?</svg>", "", path.read_text(), flags=re.DOTALL)
    assert len(texts) > 10
    for kind, numbers in values(run).items():
        if kind != "losses":  # of the public pre-training too, which are published: those of private steps are below
            found = {name: leaked(text, numbers) for name, text in texts.items()}
            assert {name: of for name, of in found.items() if of} == {}, kind


def test_no_file_outside_holds_their_bytes(run):
    folder, _, _ = run
    for kind, numbers in values(run).items():
        patterns = {struct.pack("<d", x) for x in numbers}
        for path in outside(folder):
            content = path.read_bytes()
            assert [path for pattern in patterns if pattern in content] == [], kind


def test_the_losses_that_are_published_are_of_public_images(run):
    """As many as steps of the public pre-training, and no more."""
    folder, _, _ = run
    assert len(json.loads((folder / "state/pretrain/losses.json").read_text())) == 3


def test_a_planted_value_is_found():
    """That the two tests above can fail."""
    number = 1.8512367
    for text in (f"norm {number:.9f}", f"{number:.5g}", f"[{number}, {number!r}]", f"{number:.6e}"):
        assert leaked(text, {number, 7.5}), text
    assert not leaked(f"norm {number * 1.0003:.9f} {number:.4g}", {number})
    assert struct.pack("<d", number) in torch.tensor([number], dtype=torch.float64).numpy().tobytes()


def test_without_unsafe_debug_its_word_is_nowhere(run):
    folder, output, _ = run
    assert "UNSAFE" not in output
    assert [path for path in folder.rglob("*") if path.is_file() and b"UNSAFE" in path.read_bytes()] == []


def test_with_unsafe_debug_the_progress_shows_them_and_every_statement_says_so(tmp_path, monkeypatch):
    """Of the training that is released: the baseline's shows nothing, but is of the same images."""
    monkeypatch.setattr("dpfast.runs.terminal.INTERVAL", 0.0)
    said = io.StringIO()
    recipe = load("digits", [*TINY, "private.unsafe_debug=true"])
    with pytest.warns(UserWarning, match="unsafe_debug"):
        at = execute(recipe, tmp_path, TerminalProgress(said), until="baseline").directory
    shown = r"  UNSAFE DEBUG: \d+ examples, mean loss .* clipped; private training \d/4"
    assert len(re.findall(shown, said.getvalue())) == said.getvalue().count("UNSAFE") == 4
    assert read_ledger(at.ledger).unsafe_debug
    assert not read_ledger(at.baseline_ledger).unsafe_debug
    for folder in (at.release, at.model, at.samples, at.baseline):
        assert "UNSAFE DEBUG" in (folder / "PRIVACY.md").read_text(), folder
    for folder in (at.release, at.model, at.samples):
        assert json.loads((folder / "privacy.json").read_text())["verdict"].startswith("UNSAFE DEBUG")
