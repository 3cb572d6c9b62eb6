"""The figures of a study: drawn, labelled, and readable where lines meet."""

import io

import numpy as np
import pytest
from PIL import Image

from dpfast.evaluation.studies import CountAccuracy, RankTransfer
from dpfast.report import plots

STUDIED = {
    name: [
        CountAccuracy(
            count=count, accuracies=(base, base + 0.02 * i, base + 0.01), ensemble=base + 0.03, test_images=100
        )
        for i, (count, base) in enumerate([(50_000, 0.8), (1000, 0.5), (5000, 0.7)])
    ]
    for name in ("ε = 10", "ε = 1")
}
RANKS = RankTransfer(
    settings=("a", "b", "c"), synthetic=(0.5, 0.9, 0.7), real=(0.4, 0.8, 0.6), rho=1.0, interval=(0.5, 1.0)
)


@pytest.fixture
def axes(monkeypatch):
    """What is drawn on, in order."""
    drawn = []
    real = plots._axes
    monkeypatch.setattr(plots, "_axes", lambda *labels: drawn.append(real(*labels)) or drawn[-1])
    return drawn


def fid():
    curves = {"K = 32": [(10, 9.8), (1, 25.2), (5, 15.1)], "K = 1": [(1, 48.2), (10, 26.8)]}
    return plots.fid_by_epsilon(
        curves, levels={"public only": 62.0, "no noise": 6.9}, delta=1e-5, extractor="inception"
    )


def accuracy():
    return plots.accuracy_by_count_plot(STUDIED, levels={"real data": 0.964, "DP-SGD classifier": 0.887})


def ranks():
    return plots.rank_transfer_plot(RANKS)


@pytest.mark.parametrize("draw", [fid, accuracy, ranks])
def test_figures_are_pictures_with_something_on_them(draw):
    png = draw()
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert min(picture.size) > 500
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert draw() == png  # nothing of the clock is in it


@pytest.mark.parametrize("draw", [fid, accuracy, ranks])
def test_both_axes_are_named_with_their_units(draw, axes):
    draw()
    (_, drawn) = axes[0]
    assert drawn.get_xlabel()
    assert "%" in drawn.get_ylabel() or drawn.get_ylabel() == "FID (inception), lower is closer"
    assert "δ = 1e-05" in drawn.get_xlabel() or "images" in drawn.get_xlabel()


@pytest.mark.parametrize("draw", [fid, accuracy])
def test_lines_run_from_left_to_right_and_are_named_once(draw, axes):
    draw()
    (_, drawn) = axes[0]
    curves = [line for line in drawn.lines if len(line.get_xdata()) > 1 and line.get_marker() != "None"]
    assert len(curves) == {fid: 2, accuracy: 4}[draw]
    assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in curves)
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}) == len(curves)
    texts = [text.get_text() for text in drawn.texts]
    assert texts[-1] == {fid: "public only (62.0)", accuracy: "real data (96.4%)"}[draw]
    assert len(texts) == {fid: 4, accuracy: 6}[draw]
    ticks = [label.get_text() for label in drawn.get_xticklabels()]
    assert ticks == {fid: ["1", "5", "10"], accuracy: ["1k", "5k", "50k"]}[draw]
    assert drawn.get_ylim()[1] > {fid: 62, accuracy: 96.4}[draw]


def test_the_band_spans_the_seeds(axes):
    accuracy()
    (_, drawn) = axes[0]
    heights = drawn.collections[0].get_paths()[0].vertices
    at_the_most = heights[heights[:, 0] == 50_000, 1]
    assert (at_the_most.min(), at_the_most.max()) == pytest.approx((80, 81))
    assert list(drawn.lines[0].get_ydata()) == pytest.approx(
        [100 * (0.5 + 0.01), 100 * (0.7 + 0.05 / 3), 100 * (0.8 + 0.01 / 3)]
    )


def test_the_setting_chosen_on_synthetic_images_is_ringed(axes):
    ranks()
    (_, drawn) = axes[0]
    dots, ring = drawn.collections
    assert dots.get_offsets().tolist() == pytest.approx(np.array([[50, 40], [90, 80], [70, 60]]))
    assert ring.get_offsets().tolist() == pytest.approx(np.array([[90, 80]]))
    assert drawn.get_title(loc="left") == "Spearman's ρ = 1.00 (95% interval 0.50 to 1.00), 3 settings"  # noqa: RUF001


@pytest.mark.parametrize(
    ("heights", "placed"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.465, 0.535]),
        ([0.1, 0.5, 0.5, 0.5], [0.1, 0.43, 0.5, 0.57]),
        ([0.98, 1.0], [0.955, 1.025]),
    ],
)
def test_names_that_would_meet_move_apart_by_no_more_than_they_must(heights, placed):
    assert plots._apart(heights) == pytest.approx(placed)
