"""Of a whole run: nothing computed from private images without noise is anywhere but among the private files."""

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


def written(number):
    """As it would be printed to five digits, at least; some numbers are too short to be told from others."""
    digits = f"{number:.10g}"
    head = re.match(r"-?0?\.?0*[1-9]\.?(?:\d\.?){4}", digits)
    return head[0] if head else None


def test_no_text_outside_holds_them(run):
    folder, output, _ = run
    texts = {"terminal": output}
    for path in outside(folder):
        if path.suffix in (".json", ".jsonl", ".md", ".html", ".toml", ".txt"):
            texts[str(path)] = re.sub(r"base64,[^\"]+|<svg .*?</svg>", "", path.read_text(), flags=re.DOTALL)
    assert len(texts) > 10
    for kind, numbers in values(run).items():
        shown = {written(number) for number in numbers} - {None}
        if kind != "losses":  # of the public pre-training too, which are published: those of private steps are below
            assert [(kind, name, x) for name, text in texts.items() for x in shown if x in text] == []


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


def test_a_planted_value_is_found(run, tmp_path):
    """That the two tests above can fail."""
    number = next(iter(values(run)["norms"]))
    assert written(number) in f"norm {number:.9f}"
    assert struct.pack("<d", number) in torch.tensor([number], dtype=torch.float64).numpy().tobytes()
