"""What a run has spent, and the privacy statement that follows from it."""

from __future__ import annotations

from dpfast.privacy.ledger import LedgerContents, read_ledger
from dpfast.privacy.plan import composed_epsilon
from dpfast.privacy.statement import Composition, PrivacyStatement
from dpfast.runs.run import Run
from dpfast.unnoised import UNSAFE_DEBUG

_RELEASE = "the model and every image sampled from it"


def spent(run: Run, *, baseline: bool = False) -> LedgerContents:
    """The ledger of the released model, or of the baseline classifier."""
    path = run.stages["baseline" if baseline else "train"].ledger
    assert path is not None
    return read_ledger(path)


def spent_in_all(run: Run) -> float:
    """Epsilon of releasing the baseline classifier besides the model and its samples."""
    both = [(ledger.plan, ledger.charged_steps) for ledger in (spent(run), spent(run, baseline=True))]
    return composed_epsilon(both, target_delta=run.plan.target_delta)


def model_statement(run: Run) -> PrivacyStatement:
    """What is promised of the released model and its samples."""
    return PrivacyStatement.of(
        spent(run),
        augmult=run.recipe.private.augmult,
        public=public_knowledge(run),
        not_accounted=not_accounted(run),
        subject=_RELEASE,
    )


def baseline_statement(run: Run) -> PrivacyStatement:
    """What is promised of the baseline classifier, alone and beside the model."""
    return PrivacyStatement.of(
        spent(run, baseline=True),
        augmult=run.recipe.baseline.augmult,
        public=public_knowledge(run),
        not_accounted=not_accounted(run) + _shown(run),
        subject="the classifier",
        compositions=[Composition(other=_RELEASE, epsilon=spent_in_all(run))],
    )


def public_knowledge(run: Run) -> list[str]:
    """What the guarantee takes to be known to everybody."""
    channels, height, width = run.private.image_shape
    pixels = f"{height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}"
    return [
        f"The number of private training images ({len(run.private)}).",
        f"The list of classes ({', '.join(run.private.classes)}).",
        f"The preprocessing: {pixels}, scaled from 0..255 to -1..1, without statistics of the images.",
        "Which images are held out for testing, and those images. They serve to measure, nothing else.",
        *_before(run),
    ]


def _before(run: Run) -> list[str]:
    """What the model knew before it saw a private image."""
    pretrain = run.recipe.pretrain
    known = ["The images that the model was pre-trained on."] if pretrain.steps else []
    return known + (["The weights that its training began with."] if pretrain.weights is not None else [])


def _shown(run: Run) -> list[str]:
    """What the model's training showed, whose mark is in the model's ledger alone."""
    said = f"{UNSAFE_DEBUG}: un-noised values computed from these images were shown while the model trained."
    return [said] if spent(run).unsafe_debug else []


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
