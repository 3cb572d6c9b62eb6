"""Reports: whole in themselves, honest, and the released one unable to hold what is private."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.data import ImageSet
from dpfast.files import write_json
from dpfast.privacy import Ledger, Plan, PrivacyStatement
from dpfast.report import page
from dpfast.report.comparison import Comparison
from dpfast.report.figures import contact_sheet, curve, strip
from dpfast.report.internal import ROWS, WARNING, InternalReport, indistinguishable
from dpfast.report.markdown import first_section, to_html
from dpfast.report.release import ReleaseReport, shown_epsilon


def images(value, count=20):
    pixels = torch.full((count, 1, 8, 8), value, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 10, tuple("0123456789"))


def statement(**changes):
    plan = Plan(
        dataset_size=100,
        expected_batch_size=10,
        max_grad_norm=1.0,
        steps=2,
        target_delta=1e-3,
        **(changes or {"noise_multiplier": 2.0}),
    )
    ledger = Ledger(None, plan)
    ledger.charge(1)
    return PrivacyStatement.of(
        ledger, augmult=4, public=["The <number> of images."], not_accounted=["How settings were chosen."]
    )


def release(said):
    return ReleaseReport(
        name="test",
        statement=said,
        samples=images(200),
        public_samples=images(100),
        count=200,
        losses=[1.0, 0.5, 0.4, 0.3],
        epsilon_curve=[(0, 0.0), (1, 0.5), (2, 0.7)],
        recipe='name = "test"',
        seconds={"pre-training on public images": 203.0, "private training": 5.0},
    )


def scores(fid):
    return {
        "fid": fid, "kid": 0.0412, "kid_std": 0.001, "inception_score": 7.31, "inception_score_std": 0.1,
        "precision": 0.61, "recall": 0.52, "density": 0.83, "coverage": 0.74, "real_images": 1437,
        "synthetic_images": 3000, "settings": {}, "extractor": "digits-cnn-fonts", "sha256": "0123456789abcdef" * 4,
    }  # fmt: skip


METRICS = {
    "epsilon_spent": 9.9991,
    "epsilon_baseline": 9.98,
    "epsilon_composed": 14.07,
    "delta": 1e-4,
    "accuracy": {
        "synthetic": 0.93,
        "public_only": 0.55,
        "public_classifier": 0.71,
        "real": 0.99,
        "dp_classifier": 0.97,
    },
    "classifier_seeds": 3,
    "test_images": 360,
    "private_images": "of digits",
    "accuracy_by_count": [
        {"count": 30, "accuracies": [0.7, 0.72, 0.69], "ensemble": 0.74, "test_images": 360},
        {"count": 300, "accuracies": [0.93, 0.92, 0.94], "ensemble": 0.951, "test_images": 360},
    ],
    "scores": {"synthetic": scores(3.2), "public_only": scores(9.1)},
}


def internal():
    return InternalReport(
        name="test",
        metrics=METRICS,
        private=images(50),
        samples=images(200),
        seconds={"private training": 61.0, "evaluation": 5.0},
        recipe='name = "test"',
    )


@pytest.fixture(scope="module")
def released():
    return release(statement()).html()


def visible(html):
    body = html[html.index("<body>") :]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).strip()


@pytest.mark.parametrize("which", ["release", "internal"])
def test_pages_ask_for_nothing_from_elsewhere(which, released):
    html = released if which == "release" else internal().html()
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', html)
    assert [source for source in sources if not source.startswith(("data:image/png;base64,", "#"))] == []
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert 'name="viewport"' in html


def test_the_internal_page_begins_with_the_warning():
    assert WARNING == "contains private data, do not release"
    assert visible(internal().html()).startswith(WARNING)


def test_the_internal_page_holds_figures_baselines_and_extractor():
    text = visible(internal().html())
    for said in ("93.0%", "55.0%", "71.0%", "97.0%", "99.0%", "digits-cnn-fonts", "ε = 14.07", "89.9% to 95.2%"):
        assert said in text
    for said in ("ensemble of those of the released samples reads 95.1%", "3.20 41.20 7.31 0.61 0.52 0.83 0.74"):
        assert said in text
    for said in (*(row.name for row in ROWS), "means over 3 classifiers", "private training 1 min 1 s"):
        assert said in text


@pytest.mark.parametrize(
    ("fonts", "said"),
    [
        (0.71, "+22.0 points over the public images themselves (71.0%)"),
        (0.5, "+38.0 points over samples of the public model (55.0%)"),
    ],
)
def test_the_headline_compares_with_the_better_of_the_public_two(fonts, said):
    metrics = METRICS | {"accuracy": METRICS["accuracy"] | {"public_classifier": fonts}}
    assert said in visible(dataclasses.replace(internal(), metrics=metrics).html())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"dp_classifier": 0.95}, "360 test images between “the released samples” and “real images, by DP-SGD”."),
        ({"real": 0.95, "dp_classifier": 0.92}, "“real images, by DP-SGD” or “real images”."),
        ({"synthetic": 1.0, "real": 1.0}, "“the released samples” and “real images”."),
    ],
)
def test_what_the_test_images_cannot_tell_apart_is_said(changes, said):
    metrics = METRICS | {"accuracy": METRICS["accuracy"] | changes}
    assert indistinguishable(metrics).endswith(said)
    assert bool(indistinguishable(metrics)) == bool(said)
    page = visible(dataclasses.replace(internal(), metrics=metrics).html())
    assert ("No measurable difference" in page) == bool(said)


def test_the_released_page_says_what_is_promised_and_what_is_not(released):
    text = visible(released)
    for said in ("What is promised", "not accounted", "one image", "private training", "test", "δ = 0.001"):
        assert said.lower() in text.lower()
    assert "NOT PRIVATE" not in text
    assert "accuracy of" not in text.lower()
    assert "The &lt;number&gt; of images." in released


def test_the_released_page_has_no_place_for_what_is_private():
    assert {field.name for field in dataclasses.fields(ReleaseReport)} == {
        "name", "statement", "samples", "public_samples", "count", "losses", "before",
        "epsilon_curve", "recipe", "seconds",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["no noise", "test entropy"])
def test_a_run_without_protection_is_marked_in_the_first_line(case):
    said = statement(target_epsilon=math.inf) if case == "no noise" else statement()
    if case == "test entropy":
        said = dataclasses.replace(said, test_entropy=True)
    html = release(said).html()
    assert visible(html).startswith("NOT PRIVATE")
    assert "can be passed on" not in html


@pytest.mark.parametrize("changes", [{}, {"target_epsilon": math.inf}])
def test_what_unsafe_debug_showed_is_said_in_the_first_line(changes):
    html = visible(release(dataclasses.replace(statement(**changes), unsafe_debug=True)).html())
    assert html.startswith("NOT PRIVATE" if changes else "UNSAFE DEBUG: un-noised values")
    assert "epsilon covers neither whoever saw them" in html.split("Release report")[0]
    assert "are recorded nowhere" not in html
    usual = visible(release(statement(**changes)).html())
    assert "UNSAFE" not in usual
    assert "are recorded nowhere" in usual


def test_the_released_page_gives_times_to_the_minute_and_the_statement_agrees(released):
    text = visible(released)
    assert "pre-training on public images about 3 minutes" in text
    assert "private training under a minute" in text
    assert not re.search(r"\b(203|5(\.0)? s|3 min 23)\b", text)
    assert "Rounded to minutes" in text
    assert any("rounded to minutes, as a report of dpfast gives them" in said for said in statement().out_of_scope)


def test_epsilon_is_rounded_to_the_safe_side():
    assert shown_epsilon(9.9991) == "10"
    assert shown_epsilon(1.001) == "1.01"
    assert shown_epsilon(math.inf) == "∞"


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_lays_out_rows(channels):
    rows = [torch.zeros(n, channels, 4, 6, dtype=torch.uint8) for n in (3, 2)]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(rows, scale=2))).convert("RGB"))
    assert sheet.shape == (2 * (4 + 1 + 4), 2 * (3 * 6 + 2), 3)
    assert (sheet[:8, :12] == 0).all()
    assert (sheet[10:, 26:] == 255).all()
    assert Image.open(io.BytesIO(strip(rows[0]))).size == (20, 4)


def test_curves_are_labeled_and_bare_of_metadata():
    svg = curve([1, 2, 3], [3.0, 2.0, 1.0], xlabel="step", ylabel="loss", label="Loss by step", smooth=1)
    assert svg.startswith("<svg viewBox=")
    assert 'aria-label="Loss by step"' in svg
    assert "<metadata" not in svg
    assert "width=" not in svg[: svg.index(">")]


def test_markdown_shows_html_instead_of_obeying_it():
    text = "# Title\n\n**Bold** <b>x</b>\n\n- one\n- two `c`\n\n| | |\n|---|---|\n| a | b |\n"
    html = to_html(text)
    assert "<strong>Bold</strong> &lt;b&gt;" in html
    assert "<li>two <code>c</code></li>" in html
    assert html.count("<tr>") == 1
    assert first_section(text + "\n## Next\n\nmore").startswith("**Bold**")


def test_text_is_escaped():
    assert "<i>" not in page.page("<i>", [page.paragraph("<i>"), page.code("<i>")])


def compared(**epsilons):
    runs = {}
    for name, epsilon in epsilons.items():
        runs[name] = METRICS | {
            "epsilon_spent": epsilon,
            "target_epsilon": epsilon,
            "scores": {"synthetic": scores(3.2), "public_only": scores(9)},
        }
    return runs


def test_runs_are_compared_by_epsilon():
    html = Comparison(metrics=compared(ten=9.99, one=0.99, clipped="inf")).html()
    text = visible(html)
    assert text.startswith(WARNING)
    assert text.index(" one ") < text.index(" ten ") < text.index(" clipped ")
    assert "FID of the released samples by epsilon" in html


def test_what_the_recipes_of_runs_differ_in_is_shown():
    recipes = {name: {"name": name, "private.augmult": k, "seed": 0} for name, k in (("one", 1), ("ten", 8))}
    text = visible(Comparison(metrics=compared(ten=9.99, one=0.99), recipes=recipes).html())
    assert "What they differ in key one ten private.augmult 1 8" in text
    assert "seed" not in text


def test_runs_of_one_epsilon_make_no_curve():
    html = Comparison(metrics=compared(first=10, second=10, third=1)).html()
    assert 'class="plot"' not in html


def test_distances_of_other_extractors_make_no_curve():
    runs = compared(ten=9.99, one=0.99)
    runs["one"]["scores"]["synthetic"]["sha256"] = "other"
    html = Comparison(metrics=runs).html()
    assert "cannot be compared" in html
    assert 'class="plot"' not in html


def test_the_command_compares_finished_runs_only(tmp_path):
    for name, epsilon in (("one", 0.99), ("ten", 9.99)):
        write_json(tmp_path / name / "internal" / "metrics.json", compared(x=epsilon)["x"])
        (tmp_path / name / "recipe.toml").write_text(f'base = "digits"\nname = "{name}"\n')
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "one"), str(tmp_path / "ten"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "FID by epsilon" in page.read_text()
    for folders, said in ((["one"], "two runs or more"), (["one", "none"], "is no finished run")):
        result = CliRunner().invoke(app, ["compare", *(str(tmp_path / folder) for folder in folders)])
        assert result.exit_code == 2
        assert said in result.output
