"""The privacy statement of a run, from what its ledgers say was spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpfast.privacy.ledger import LedgerContents, read_ledger
from dpfast.privacy.statement import PrivacyStatement

if TYPE_CHECKING:
    from dpfast.runs.pipeline import Run


def spent(run: Run, *, baseline: bool = False) -> LedgerContents:
    """The ledger of the released model, or of the baseline classifier."""
    path = run.stages["baseline" if baseline else "train"].ledger
    assert path is not None
    return read_ledger(path)


def statement(run: Run, *, baseline: bool = False) -> PrivacyStatement:
    """What is promised of the released model and its samples, or of the baseline classifier."""
    subject = "the classifier" if baseline else "the model and every image sampled from it"
    table = run.recipe.baseline if baseline else run.recipe.private
    return PrivacyStatement.of(
        spent(run, baseline=baseline),
        augmult=table.augmult,
        public=public_knowledge(run),
        not_accounted=not_accounted(run),
        subject=subject,
    )


def public_knowledge(run: Run) -> list[str]:
    """What the guarantee takes to be known to everybody."""
    channels, height, width = run.private.image_shape
    pixels = f"{height}x{width} pixels in {channels} channel(s)"
    return [
        f"The number of private training images ({len(run.private)}).",
        f"The list of classes ({', '.join(run.private.classes)}).",
        f"The preprocessing: {pixels}, scaled from 0..255 to -1..1, without statistics of the images.",
        "Which images are held out for testing, and those images. They serve to measure, nothing else.",
        "The images that the model was pre-trained on.",
    ]


def not_accounted(run: Run) -> list[str]:
    """What was learned from private images outside the accounting."""
    items = [
        "How the settings (hyperparameters) were chosen: runs on private images to choose them are not counted.",
        "Other runs on the same images: releasing the results of several adds up.",
    ]
    if run.recipe.data.fold is not None:
        items.append(
            f"This run used fold {run.recipe.data.fold} of the training images, to choose settings; its test"
            " images are private images too."
        )
    return items
