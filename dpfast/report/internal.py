"""For those who hold the private images: what the synthetic ones are worth. Never to be released."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from dpfast.data import ImageSet
from dpfast.evaluation.intervals import accuracy_interval, differ
from dpfast.evaluation.studies import CountAccuracy
from dpfast.progress import duration
from dpfast.report import page as html
from dpfast.report.plots import accuracy_by_count_plot
from dpfast.report.release import shown_epsilon

WARNING = "contains private data, do not release"


class Row(NamedTuple):
    """One classifier: its ``key`` in the metrics, what it was trained on, and what that means."""

    key: str
    name: str
    meaning: str


ROWS = (
    Row("public_classifier", "the public images themselves", "no private image is used"),
    Row("public_only", "samples of the public model", "the model before private training: no private image is used"),
    Row("synthetic", "the released samples", "the model after private training; nothing else is used"),
    Row("dp_classifier", "real images, by DP-SGD", "a private classifier in its own right: no images to release"),
    Row("real", "real images", "the private images as they are: no protection"),
)
PUBLIC = ROWS[:2]
UNPROTECTED = "real"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


SCORES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("FID", "fid", _two),
    ("1000 KID", "kid", lambda kid: _two(None if kid is None else 1000 * kid)),
    ("Inception score", "inception_score", _two),
    ("precision", "precision", _two),
    ("recall", "recall", _two),
    ("density", "density", _two),
    ("coverage", "coverage", _two),
)


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """Those that were measured: public images of other classes make no classifier for the private ones."""
    return [row for row in ROWS if row.key in metrics["accuracy"]]


@dataclass(frozen=True, kw_only=True)
class InternalReport:
    """What ``internal/report.html`` shows: ``metrics`` as in ``metrics.json``, images, and seconds by stage."""

    name: str
    metrics: Mapping[str, Any]
    private: ImageSet
    samples: ImageSet
    seconds: Mapping[str, float]
    recipe: str

    def html(self) -> str:
        """The whole page; its first visible line is the warning."""
        lead = "How useful the synthetic images are, measured on real ones that took no part in the training."
        body = [
            html.header(f"Internal report · {self.name}", "What the synthetic images are worth", lead),
            html.cards(self._figures()),
            self._accuracies(),
            self._by_count(),
            self._scores(),
            self._images(),
            self._budget(),
            self._details(),
        ]
        return html.page(f"{self.name}: internal report", body, banner=WARNING)

    def _figures(self) -> list[tuple[str, str]]:
        accuracy = self.metrics["accuracy"]
        best = max((row for row in PUBLIC if row.key in accuracy), key=lambda row: accuracy[row.key])
        gain = 100 * (accuracy["synthetic"] - accuracy[best.key])
        return [
            (percent(accuracy["synthetic"]), "of real test images read after training on the released samples alone"),
            (
                f"{gain:+.1f} points",
                f"over {best.name} ({percent(accuracy[best.key])}), the best without private images",
            ),
            (f"ε = {shown_epsilon(float(self.metrics['epsilon_spent']))}", f"at δ = {self.metrics['delta']:g}"),
            (f"{self.metrics['test_images']:,}", "real test images"),
        ]

    def _accuracies(self) -> str:
        rows = "".join(self._row(row) for row in rows_of(self.metrics))
        table = (
            '<div class="scroll"><table><thead><tr><th>classifier trained on</th><th class="number">ε</th>'
            '<th class="number">accuracy</th><th class="number">95% interval</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
        parts = [html.paragraph(f"{self._averaging()} {self._uncertainty()}", note=True)]
        alike = indistinguishable(self.metrics)
        if alike:
            parts.insert(0, html.paragraph(alike))
        return html.section("Accuracy on real test images", table, *parts)

    def _row(self, row: Row) -> str:
        value, images = self.metrics["accuracy"][row.key], self.metrics["test_images"]
        low, high = accuracy_interval(value, images)
        bar = f'<div class="bar"><i style="width:{100 * value:.1f}%"></i></div>'
        kind = " class=main" if row.key == "synthetic" else ""
        return (
            f"<tr{kind}><td>{escape(row.name)}<small>{escape(row.meaning)}</small>{bar}</td>"
            f'<td class="number">{shown_epsilon(self._epsilon(row.key))}</td><td class="number">{percent(value)}</td>'
            f'<td class="number">{percent(low)} to {percent(high)}</td></tr>'
        )

    def _epsilon(self, key: str) -> float:
        spent = {"synthetic": "epsilon_spent", "dp_classifier": "epsilon_baseline"}
        if key in spent:
            return float(self.metrics[spent[key]])
        return math.inf if key == "real" else 0.0

    def _averaging(self) -> str:
        seeds = self.metrics["classifier_seeds"]
        if seeds == 1:
            return "Each figure is of one classifier."
        return (
            f"Figures of {ROWS[1].name}, of {ROWS[2].name} and of {ROWS[4].name} are means over {seeds} classifiers;"
            f" the others are of one each. An ensemble of those of {ROWS[2].name} reads {percent(self._ensemble())}."
        )

    def _ensemble(self) -> float:
        return float(self.metrics["accuracy_by_count"][-1]["ensemble"])

    def _uncertainty(self) -> str:
        return (
            f"The intervals say how far {self.metrics['test_images']} test images can tell, and no more: another"
            " training, with other noise, gives other figures."
        )

    def _by_count(self) -> str:
        points = [CountAccuracy(**point) for point in self.metrics["accuracy_by_count"]]
        if len(points) == 1:
            return ""
        levels = {row.name: self.metrics["accuracy"][row.key] for row in ROWS if row.key in ("dp_classifier", "real")}
        plot = accuracy_by_count_plot(
            {"released samples": points}, levels=levels, ensemble=len(points[0].accuracies) > 1
        )
        said = "Accuracy by the number of released samples that a classifier was trained on"
        return html.section(
            "How many images to train on",
            html.figure(html.image(plot, said), f"{said}. Of the smaller numbers the first samples of each class."),
        )

    def _scores(self) -> str:
        scores = self.metrics["scores"]
        named = (("samples of the public model", scores["public_only"]), ("released samples", scores["synthetic"]))
        rows = [(name, *(shown(of[key]) for _, key, shown in SCORES)) for name, of in named]
        of = scores["synthetic"]
        return html.section(
            "Distance to the real images",
            html.table(("images", *(name for name, _, _ in SCORES)), rows, numbers=range(1, 1 + len(SCORES))),
            html.paragraph(
                f"Of {of['synthetic_images']:,} samples to the {of['real_images']:,} private training images, in the"
                f" features of the extractor “{of['extractor']}” (sha256 {of['sha256'][:12]}). Closer is: a smaller FID"
                " (Fréchet distance) and KID, larger others. Only figures of the same extractor, settings and numbers"
                " of images can be compared.",
                note=True,
            ),
        )

    def _images(self) -> str:
        shown = [
            (self.private, "Real: private training images."),
            (self.samples, "Synthetic: the released samples."),
        ]
        figures = [html.figure(html.sample_rows(s.images, s.labels, s.classes), text) for s, text in shown]
        return html.section("Real and synthetic", '<div class="pair">', *figures, "</div>")

    def _budget(self) -> str:
        composed = shown_epsilon(float(self.metrics["epsilon_composed"]))
        return html.section(
            "What has been spent",
            html.paragraph(
                "The baseline classifier has a ledger of its own: it is another way to spend the same budget,"
                " and is not part of the release. Whoever releases it, besides the synthetic images,"
                f" has spent ε = {composed} at δ = {self.metrics['delta']:g} in all."
            ),
            html.paragraph(
                "The figures on this page were computed from private images without any protection. They are"
                " here to judge by, not to publish."
            ),
        )

    def _details(self) -> str:
        times = [(title, duration(seconds)) for title, seconds in self.seconds.items()]
        return html.section(
            "Details",
            html.table(("stage", "time"), times, numbers=(1,)),
            html.folded("The resolved recipe", html.code(self.recipe)),
        )


def percent(value: float) -> str:
    """0.934 as "93.4%"."""
    return f"{100 * value:.1f}%"


def indistinguishable(metrics: Mapping[str, Any]) -> str:
    """A sentence that names the classifiers which the test images cannot tell from the synthetic one, or nothing."""
    accuracy, images = metrics["accuracy"], metrics["test_images"]
    ours = next(row for row in ROWS if row.key == "synthetic")
    alike = [
        f"“{row.name}”"
        for row in rows_of(metrics)
        if row != ours and not differ(accuracy["synthetic"], accuracy[row.key], images)
    ]
    if not alike:
        return ""
    return f"No measurable difference on {images} test images between “{ours.name}” and {' or '.join(alike)}."
