"""For those who hold the private images: what attacks found. Never to be released."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch

from dpfast.audit.canaries import CanaryAudit
from dpfast.audit.members import RATES, Copies, Membership
from dpfast.data import ImageSet
from dpfast.report import page as html
from dpfast.report.figures import contact_sheet
from dpfast.report.internal import WARNING, percent


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What ``internal/audit/report.html`` shows. released, private: the images that ``copies`` speaks of."""

    name: str
    canaries: CanaryAudit
    model: Membership | None
    samples: Membership | None
    copies: Copies | None
    released: ImageSet | None
    private: ImageSet | None

    def html(self) -> str:
        """The whole page; its first visible line is the warning."""
        lead = (
            "What attackers can show of this training. A sound one lets them show less than it promises; that they show"
            " less proves nothing."
        )
        of = self.canaries
        body = [
            html.header(f"Audit · {self.name}", "What attacks found", lead),
            html.cards(
                [
                    (
                        f"ε ≥ {of.training.epsilon:.2f}",
                        f"shown of the training (confidence {of.training.confidence:g})",
                    ),
                    (f"ε = {of.training_epsilon:.2f}", "said by the accountant, an upper bound"),
                    ("sound" if all(one.sound for one in of.findings) else "refuted", "is the claim, by these attacks"),
                ]
            ),
            self._canaries(),
            self._membership(),
            self._copies(),
        ]
        return html.page(f"{self.name}: audit", body, banner=WARNING)

    def _canaries(self) -> str:
        rows = [
            (escape(one.name), f"{one.seen:.3f}", one.limits, "yes" if one.sound else "NO")
            for one in self.canaries.findings
        ]
        return html.section(
            "One training with canaries",
            html.table(("what was seen", "", "in a sound training", "sound"), rows, numbers=(1,)),
            html.paragraph(
                "Canaries are examples with a gradient of their own, the easiest to find; a fair coin put each into the"
                " data set of a training like this one, and an attacker who saw every noised sum guessed which were"
                " there (Steinke, Nasr, Jagielski 2023).",
                note=True,
            ),
        )

    def _membership(self) -> str:
        found = (("losses of the released model", self.model), ("distances to the released samples", self.samples))
        rows = [
            (
                name,
                f"{of.auroc:.3f} ± {1.96 * of.auroc_error:.3f}",
                *(f"{percent(seen)} (up to {percent(high)})" for seen, high in of.true_positives),
            )
            for name, of in found
            if of is not None
        ]
        if not rows:
            return html.paragraph("The run has no model and no samples yet: nothing else was attacked.", note=True)
        head = ("told by", "area under ROC", *(f"told at {100 * rate:g}% false" for rate in RATES))
        return html.section(
            "Who took part",
            html.table(head, rows, numbers=range(1, len(head))),
            html.paragraph(
                "Training images against the test images, told apart by one threshold. 0.5 is a coin toss, as are"
                " shares told that equal the share of false ones. Where test images are of another kind (another"
                " hospital), a difference shows that, not membership.",
                note=True,
            ),
        )

    def _copies(self) -> str:
        if self.copies is None or self.released is None or self.private is None:
            return ""
        low, high = self.copies.nearer_limits
        pairs = torch.tensor(self.copies.pairs)
        rows = [self.released.images[pairs[:, 0]], self.private.images[pairs[:, 1]]]
        said = "The released samples nearest to a training image (above), and these images (below)"
        return html.section(
            "Copies",
            html.figure(html.image(contact_sheet(rows, scale=4), said), f"{said}."),
            html.paragraph(
                f"{percent(self.copies.nearer)} ({percent(low)} to {percent(high)}) of the samples lie nearer to a"
                " training image than to any of as many test images: half of them would, if training had left no trace."
            ),
        )
