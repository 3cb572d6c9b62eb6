"""For those who hold the private images: what the synthetic ones are worth. Never to be released."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from dpfast.data import ImageSet
from dpfast.report import page as html
from dpfast.report.release import STAGE_NAMES, shown_epsilon
from dpfast.runs.progress import duration

WARNING = "contains private data, do not release"

ROWS = (
    ("public_only", "public only", "classifier trained on samples of the model before private training"),
    ("synthetic", "synthetic", "classifier trained on the released samples alone"),
    ("dp_classifier", "DP-SGD classifier", "trained privately on the real images: no images to release"),
    ("real", "real images", "classifier trained on the private images: no protection"),
)


@dataclass(frozen=True, kw_only=True)
class InternalReport:
    """What ``internal/report.html`` shows: ``metrics`` as in ``metrics.json``, and images."""

    name: str
    metrics: Mapping[str, Any]
    private: ImageSet
    samples: ImageSet
    public_samples: ImageSet
    seconds: Mapping[str, float]
    recipe: str

    def html(self) -> str:
        """The whole page; its first visible line is the warning."""
        lead = "How useful the synthetic images are, measured on real ones that took no part in the training."
        body = [
            html.header(f"Internal report · {self.name}", "What the synthetic images are worth", lead),
            html.cards(self._figures()),
            self._accuracies(),
            self._frechet(),
            self._images(),
            self._budget(),
            self._details(),
        ]
        return html.page(f"{self.name}: internal report", body, banner=WARNING)

    def _figures(self) -> list[tuple[str, str]]:
        accuracy = self.metrics["accuracy"]
        gain = 100 * (accuracy["synthetic"] - accuracy["public_only"])
        return [
            (
                percent(accuracy["synthetic"]),
                "of real test images read after training on synthetic ones alone",
            ),
            (f"{gain:+.1f}", "points over public images only"),
            (
                f"ε = {shown_epsilon(float(self.metrics['epsilon_spent']))}",
                f"at δ = {self.metrics['delta']:g}",
            ),
            (f"{self.metrics['test_images']:,}", "real test images"),
        ]

    def _accuracies(self) -> str:
        rows = "".join(self._row(*row) for row in ROWS)
        table = (
            '<div class="scroll"><table><thead><tr><th>trained on</th><th class="number">ε</th>'
            f'<th class="number">accuracy</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
        error = standard_error(self.metrics["accuracy"]["synthetic"], self.metrics["test_images"])
        return html.section(
            "Accuracy on real test images",
            table,
            html.paragraph(
                f"Classifiers averaged for each figure: {self.metrics['classifier_seeds']}; the DP-SGD"
                f" classifier is a single one. On {self.metrics['test_images']} test images the standard"
                f" error of the synthetic figure is {100 * error:.1f} points.",
                note=True,
            ),
        )

    def _row(self, key: str, name: str, meaning: str) -> str:
        value = self.metrics["accuracy"][key]
        private = float(self.metrics["epsilon_spent"])
        rival = float(self.metrics["epsilon_baseline"])
        epsilon = {"public_only": 0.0, "synthetic": private, "dp_classifier": rival, "real": math.inf}[key]
        bar = f'<div class="bar"><i style="width:{100 * value:.1f}%"></i></div>'
        kind = " class=main" if key == "synthetic" else ""
        return (
            f"<tr{kind}><td>{escape(name)}<small>{escape(meaning)}</small>"
            f'{bar}</td><td class="number">{shown_epsilon(epsilon)}</td>'
            f'<td class="number">{percent(value)}</td></tr>'
        )

    def _frechet(self) -> str:
        frechet = self.metrics["frechet"]
        rows = [
            ("samples of the public model", f"{frechet['public_only']:.1f}"),
            ("released samples", f"{frechet['synthetic']:.1f}"),
        ]
        return html.section(
            "Distance to the real images",
            html.table(("images", "Fréchet distance"), rows, numbers=(1,)),
            html.paragraph(
                "Distance to the private training images in the features of the extractor"
                f" “{frechet['extractor']}”, a classifier trained on public images only; smaller is"
                " closer. Only figures of the same extractor can be compared.",
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
        times = [(text, duration(self.seconds[key])) for key, text in STAGE_NAMES.items() if key in self.seconds]
        return html.section(
            "Details",
            html.table(("stage", "time"), times, numbers=(1,)),
            html.folded("The resolved recipe", html.code(self.recipe)),
        )


def percent(value: float) -> str:
    """0.934 as "93.4%"."""
    return f"{100 * value:.1f}%"


def standard_error(share: float, count: int) -> float:
    """Of a share measured on ``count`` independent images."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)
