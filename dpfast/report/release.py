"""The report that may leave the building. Its input holds nothing that was computed from private images, save
through the private model, and there is no field in it for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpfast.data import ImageSet
from dpfast.privacy.accounting import rounded_up
from dpfast.privacy.statement import SHOWN, PrivacyStatement
from dpfast.progress import coarse_duration
from dpfast.report import page as html
from dpfast.report.figures import curve
from dpfast.report.markdown import first_section, to_html


@dataclass(frozen=True, kw_only=True)
class ReleaseReport:
    """What ``release/report.html`` shows.

    samples, public_samples: some of the private model's, and of the model's before it saw a private image. count: of
    all samples.
    losses: of the public pre-training, one a step; empty without it. epsilon_curve: (step, epsilon), empty without
    noise. recipe: TOML. seconds: by stage; shown to the minute. before: what the model knew before private training.
    """

    name: str
    statement: PrivacyStatement
    samples: ImageSet
    public_samples: ImageSet
    count: int
    losses: Sequence[float]
    epsilon_curve: Sequence[tuple[int, float]]
    recipe: str
    seconds: Mapping[str, float]
    before: str = "public images only"

    def html(self) -> str:
        """The whole page."""
        private = self.statement.is_private
        failures = [] if private else [f"{_failure(self.statement)} Do not release."]
        failures += [SHOWN] if self.statement.unsafe_debug else []
        lead = (
            f"{self.count:,} synthetic images and the model that drew them. The model was trained on"
            f" {self.statement.dataset_size:,} private images under differential privacy, so that"
            " this folder can be passed on, with the promise below."
            if private
            else "This run was made without protection, to compare with. Treat it like the private images."
        )
        body = [
            html.header(f"Release report · {self.name}", "Synthetic images from a private model", lead),
            html.cards(self._figures(), alarm=bool(failures)),
            self._meaning(),
            self._samples(),
            self._training(),
            self._limits(),
            self._contents(),
            self._details(),
        ]
        return html.page(f"{self.name}: release report", body, banner=" ".join(failures) or None)

    def _figures(self) -> list[tuple[str, str]]:
        said = self.statement
        return [
            (f"ε = {shown_epsilon(said.epsilon)}", f"privacy loss, at δ = {said.delta:g}"),
            ("one image", "is what the promise protects"),
            (f"{said.dataset_size:,}", "private training images"),
            (f"{self.count:,}", f"synthetic images in {self.samples.num_classes} classes"),
        ]

    def _meaning(self) -> str:
        if not self.statement.is_private:
            return ""
        return html.section(
            "What is promised",
            to_html(first_section(self.statement.text())),
            html.paragraph(
                "A patient with several images among the private ones is protected less: with n images,"
                " epsilon is n times as large and delta grows too."
            ),
        )

    def _samples(self) -> str:
        ours = html.sample_rows(self.samples.images, self.samples.labels, self.samples.classes)
        before = html.sample_rows(self.public_samples.images, self.public_samples.labels, self.public_samples.classes)
        return html.section(
            "Samples",
            '<div class="pair">',
            html.figure(ours, "The released model. One row per class, the first images of each: not hand-picked."),
            html.figure(before, f"The same model before private training, when it knew {self.before}."),
            "</div>",
        )

    def _training(self) -> str:
        figures = []
        if self.losses:
            loss = curve(
                range(1, len(self.losses) + 1),
                self.losses,
                xlabel="step",
                ylabel="loss",
                label="Loss of the public pre-training by step",
                smooth=max(1, len(self.losses) // 40),
            )
            figures.append(html.figure(loss, "Public pre-training: loss at each step, and its running mean."))
        if self.epsilon_curve:
            steps, epsilons = zip(*self.epsilon_curve, strict=True)
            spent = curve(
                steps,
                epsilons,
                xlabel="private step",
                ylabel="ε spent",
                label="Epsilon spent by private step",
                level=(epsilons[-1], f"ε = {shown_epsilon(epsilons[-1])} in all"),
            )
            figures.append(
                html.figure(spent, "Private training: ε grows with every step and stops at the planned one.")
            )
        return html.section(
            "How it was trained",
            '<div class="pair">',
            *figures,
            "</div>",
            html.paragraph(
                SHOWN
                if self.statement.unsafe_debug
                else "The loss, gradient norms and batch sizes of the private training are recorded nowhere: they"
                " would tell about the private images.",
                note=True,
            ),
        )

    def _limits(self) -> str:
        return html.section(
            "What is not promised",
            html.heading("Treated as public, so not protected"),
            html.bullets(self.statement.public),
            html.heading("Not accounted for"),
            html.bullets(self.statement.not_accounted),
            html.heading("Outside the promise"),
            html.bullets(self.statement.out_of_scope),
        )

    def _contents(self) -> str:
        rows = [
            ("<code>samples/</code>", "the images and labels as <code>.npz</code>, and a picture of some"),
            ("<code>model/</code>", "weights and noise schedule, in the format of diffusers"),
            (
                "<code>PRIVACY.md</code>, <code>privacy.json</code>",
                "the privacy statement, also beside the model and the samples: pass it on with them",
            ),
            ("<code>report.html</code>", "this page"),
        ]
        return html.section("In this folder", html.table(("file", "content"), rows))

    def _details(self) -> str:
        times = [(title, coarse_duration(seconds)) for title, seconds in self.seconds.items()]
        return html.section(
            "Details",
            html.table(("stage", "time"), times, numbers=(1,)),
            html.paragraph(
                "Rounded to minutes. How long private training takes depends on the actual batches, which the promise"
                " does not cover: publish no finer times than these.",
                note=True,
            ),
            html.folded("The full privacy statement", to_html(self.statement.text())),
            html.folded("The resolved recipe", html.code(self.recipe)),
        )


def shown_epsilon(epsilon: float) -> str:
    """Epsilon to two decimals, rounded up: a rounded promise must not be a better one."""
    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon, 2):g}"


def _failure(said: PrivacyStatement) -> str:
    if said.test_entropy:
        return "NOT PRIVATE: made with the repeatable random numbers of a test."
    return "NOT PRIVATE: gradients were clipped, but no noise was added."
