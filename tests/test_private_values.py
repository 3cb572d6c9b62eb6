"""Of a whole run, whose steps are logged: nothing computed from private images without noise is anywhere but among the
private files, unless ``unsafe_debug`` shows it, which every statement says.
"""

import csv
import io
import json
import re
import struct
from itertools import pairwise, product
from statistics import fmean, median

import pytest
import torch
from typer.testing import CliRunner

from dpfast import DPTrainer, GhostClipper
from dpfast.callbacks import CSVLogger, TensorBoardLogger
from dpfast.cli import app
from dpfast.privacy import read_ledger
from dpfast.recipes import load
from dpfast.runs.pipeline import execute
from dpfast.runs.terminal import TerminalProgress
from test_runs import TINY
from test_trainer import trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, what it printed, and the norms, factors and losses of each of its private steps."""
    folder, steps = tmp_path_factory.mktemp("runs"), []
    backward, take, make = GhostClipper.backward, DPTrainer._take, DPTrainer.__init__

    def made(self, *arguments, **options):
        make(self, *arguments, **options)
        if "internal" not in self.state_dir.parts:  # the baseline's
            self.callbacks = (CSVLogger(self.state_dir / "log.csv"), TensorBoardLogger(self.state_dir / "events"))

    def taken(self, *arguments):
        steps.append({"losses": [], "norms": [], "factors": []})
        take(self, *arguments)

    def watched(self, losses, **options):
        result = backward(self, losses, **options)
        seen = {"losses": losses.detach(), "norms": result.norms, "factors": result.clip_factors}
        for name, of in seen.items():
            steps[-1][name] += of.double().tolist()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPTrainer, "__init__", made)
        patch.setattr(DPTrainer, "_take", taken)
        patch.setattr(GhostClipper, "backward", watched)
        flags = [part for setting in TINY for part in ("--set", setting)]
        result = CliRunner().invoke(app, ["run", "digits", "--runs", str(folder), *flags])
    assert result.exit_code == 0, result.output
    return folder / "tiny", result.output, steps


def values(run):
    """All of them: those of the steps, what is made of a step's, and the unprotected figures of ``metrics.json``."""
    folder, _, steps = run
    metrics = json.loads((folder / "internal/metrics.json").read_text())
    scores = [value for of in metrics["scores"].values() for key, value in of.items() if key.split("_")[0] in SCORES]
    found = {"scores": scores, "real": [metrics["accuracy"]["real"]]}
    for name in ("losses", "norms", "factors"):
        each = [step[name] for step in steps if step[name]]
        found[name] = [value for of in each for value in of]
        found[f"{name} of a step"] = [make(of) for of in each for make in (sum, fmean, median, max, min)]
    assert all(len(of) > 0 for of in found.values())
    return {name: {x for x in of if x not in (0.0, 1.0)} for name, of in found.items()}


SCORES = ("fid", "kid", "precision", "recall", "density", "coverage")

# All that a run leaves outside of internal/, and all that it says: whatever else were there would have to be looked at.
FILES = re.compile(
    r"lock|recipe\.toml"
    r"|release/((model/|samples/)?(PRIVACY\.md|privacy\.json)|report\.html)"
    r"|release/model/(classes\.json|config\.json|scheduler_config\.json|diffusion_pytorch_model\.safetensors)"
    r"|(release/samples|state/sample/public)/(grid\.png|manifest\.json|shard-\d{5}\.npz)"
    r"|state/(DO_NOT_RELEASE\.txt|(pretrain|train|sample|baseline|evaluate|report)/stage\.json)"
    r"|state/pretrain/(checkpoint|losses\.json|model/(config\.json|diffusion_pytorch_model\.safetensors))"
    r"|state/train/(checkpoint|ledger\.jsonl|log\.csv|events/events\.out\.tfevents\.[^/]+)|state/public-classifier-[0-9a-f]{16}"
)
LINES = re.compile(
    r"|\w+ \.\.\.|\w+: done in (\d+ min )?\d+ s|  [a-z -]+ \d+/\d+, about [\w ]+ left"  # the last where it takes long
    r"|Accuracy on 360 real test images of a classifier trained on"
    r"|  (the public images themselves|samples of the public model|the released samples|real images, by DP-SGD)"
    r" +\d+\.\d%"
    r"|  real images +see the internal report"
    r"|(No measurable|A) difference [^\d]*360 test images [^\d]*"
    r"|Privacy: epsilon 1 at delta 0\.0001, for one image"
    r"|(May be released|Must not \(private\)): +/\S+/report\.html"
)


def outside(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "internal" not in path.relative_to(folder).parts]


# All that loggers write of a step (``dpfast.callbacks.values`` says why each is covered).
LOGGED = {
    "epsilon_at_most", "learning_rate", "expected_batch_size", "lost_steps", "parameter_norm", "update_norm",
    "noised_gradient_norm", "expected_noise_norm", "noise_share", "ema_distance",
}  # fmt: skip


def events(path):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return list(LegacyEventFileLoader(str(path)).Load())


def text_of(path):
    """None of a file that holds no text."""
    if path.suffix in (".json", ".jsonl", ".md", ".html", ".toml", ".txt", ".csv"):
        return re.sub(r"base64,[^\"]+|<svg .*?</svg>", "", path.read_text(), flags=re.DOTALL)
    if "tfevents" in path.name:
        return " ".join(f"{value.simple_value:.9e}" for event in events(path) for value in event.summary.value)
    return None


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
    texts |= {str(path): text for path in outside(folder) if (text := text_of(path)) is not None}
    assert len(texts) > 10
    assert sum("log.csv" in name or "tfevents" in name for name in texts) == 2
    for kind, numbers in values(run).items():
        found = {name: leaked(text, numbers) for name, text in texts.items()}
        assert {name: of for name, of in found.items() if of} == {}, kind


def test_nothing_is_there_or_said_that_was_not_looked_at(run):
    """How many examples a step drew, say, or a loss of two digits: among other numbers they could not be told."""
    folder, output, _ = run
    names = [str(path.relative_to(folder)) for path in outside(folder)]
    assert [name for name in names if not FILES.fullmatch(name)] == []
    assert [line for line in output.splitlines() if not LINES.fullmatch(line)] == []


def test_loggers_write_what_is_listed_and_no_times(run):
    """How long a step took tells how many examples it drew: every event has the time of the first."""
    folder, _, steps = run
    with open(folder / "state/train/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (path,) = (folder / "state/train/events").iterdir()
    begun, *logged = events(path)
    assert set(rows[0]) == {"step", *LOGGED}
    assert [{value.tag for value in event.summary.value} for event in logged] == [{f"dpfast/{n}" for n in LOGGED}] * 4
    assert len(rows) == len(logged) == 4 < len(steps)
    assert {event.wall_time for event in logged} == {begun.wall_time // 60 * 60}
    assert all(value for row in rows for value in row.values())


def test_no_file_outside_holds_their_bytes(run):
    """In float64 each by itself, in float32 those that follow each other: four bytes are found by chance."""
    folder, _, steps = run
    patterns = {kind: {struct.pack("<d", x) for x in numbers} for kind, numbers in values(run).items()}
    for name in steps[0]:
        pairs = {pair for step in steps for pair in pairwise(step[name])} - set(product((0.0, 1.0), repeat=2))
        patterns[f"{name} in float32"] = {struct.pack("<2f", *pair) for pair in pairs}
    for kind, of in patterns.items():
        for path in outside(folder):
            content = path.read_bytes()
            assert [path for pattern in of if pattern in content] == [], kind


def test_the_losses_that_are_published_are_of_public_images(run):
    """As many as steps of the public pre-training, and no more."""
    folder, _, _ = run
    assert len(json.loads((folder / "state/pretrain/losses.json").read_text())) == 3


def test_a_planted_value_is_found(tmp_path):
    """That the tests above can fail."""
    number = 1.8512367
    for logger in (CSVLogger(tmp_path / "log.csv"), TensorBoardLogger(tmp_path)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dpfast.callbacks.values", lambda _: {"noise_share": 0.97531, "norm": number})
            trainer(callbacks=[logger]).fit()
    for path in tmp_path.iterdir():
        assert leaked(text_of(path), {number, 7.5}), path
        assert not leaked(text_of(path), {7.5})
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
