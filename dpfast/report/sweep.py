"""For those who hold the private images: settings compared, and whether synthetic images rank them as real ones do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpfast.evaluation.intervals import rank_correlation
from dpfast.evaluation.studies import FEWEST_SETTINGS, RankTransfer
from dpfast.report import page as html
from dpfast.report.internal import WARNING, percent
from dpfast.report.plots import rank_transfer_plot


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What ``internal/sweep/report.html`` shows; accuracies by setting, 0 to 1. held_out: samples scored on."""

    name: str
    settings: Sequence[str]
    synthetic: Sequence[float]
    real: Sequence[float]
    chosen: str
    noised_counts: Sequence[float] | None
    held_out: int
    test_images: int

    def html(self) -> str:
        """The whole page; its first visible line is the warning."""
        lead = "Settings of sampling and of classifiers, compared on synthetic images."
        body = [
            html.header(f"Internal report · {self.name}", "Settings compared", lead),
            html.cards(
                [
                    (self.chosen, "chosen by " + ("its noised count" if self.noised_counts else "synthetic images")),
                    (f"{len(self.settings)}", "settings, one classifier each"),
                    (f"{self.held_out:,}", "held-out samples to choose by"),
                    (f"{self.test_images:,}", "real test images, to look at and not to choose by"),
                ]
            ),
            self._table(),
            self._transfer(),
        ]
        return html.page(f"{self.name}: settings compared", body, banner=WARNING)

    def _table(self) -> str:
        order = sorted(range(len(self.settings)), key=lambda i: -self.synthetic[i])
        rows = [
            (
                escape(self.settings[i]),
                percent(self.synthetic[i]),
                *([f"{self.noised_counts[i]:.0f}"] if self.noised_counts else []),
                percent(self.real[i]),
            )
            for i in order
        ]
        head = ("setting", "held-out synthetic", *(["noised count"] if self.noised_counts else []), "real test images")
        return html.section(
            "Accuracy",
            html.table(head, rows, numbers=range(1, len(head))),
            html.paragraph(
                "The first column of figures comes from released images alone"
                + (
                    ", the noised counts from private ones with noise that the budget holds"
                    if self.noised_counts
                    else ""
                )
                + ": choosing by it is part of the promise. Choosing by the last column is not.",
                note=True,
            ),
        )

    def _transfer(self) -> str:
        if len(self.settings) < FEWEST_SETTINGS or min(len(set(self.synthetic)), len(set(self.real))) < 2:
            return ""
        rho, interval = rank_correlation(tuple(self.synthetic), tuple(self.real))
        found = RankTransfer(
            settings=tuple(self.settings),
            synthetic=tuple(self.synthetic),
            real=tuple(self.real),
            rho=rho,
            interval=interval,
        )
        said = "Accuracy on real test images over accuracy on held-out synthetic ones, a dot for each setting"
        return html.section(
            "Do synthetic images rank as real ones do?",
            html.figure(html.image(rank_transfer_plot(found), said), f"{said}; {self.test_images:,} real test images."),
        )
