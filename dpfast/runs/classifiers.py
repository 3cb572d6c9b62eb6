"""The classifiers that a run keeps in files: that of the public images, and the private baseline."""

from __future__ import annotations

from pathlib import Path

import torch

from dpfast import checkpoint
from dpfast.data import ImageSet
from dpfast.evaluation import Classifier, ClassifierSpec, build_classifier, train_classifier
from dpfast.evaluation.extractors import Extractor, classifier_extractor, extractor_name
from dpfast.progress import Progress
from dpfast.recipes import fingerprint, parts
from dpfast.runs import build, inputs
from dpfast.runs.run import Run
from dpfast.runs.seeds import seed_for


def public_classifier(run: Run, progress: Progress) -> Classifier:
    """The classifier of the public images: feature extractor, and where the private classifier starts.

    A collective: rank 0 trains it where that is not done yet, and the others wait.
    """
    keys = ("seed", "data.public", "data.public_count", "evaluate.extractor_steps")
    key = fingerprint(parts(run.recipe, *keys) | inputs.public_identity(run.recipe))
    path = run.directory.state / f"public-classifier-{key}"

    def train() -> None:
        if not path.exists():
            seed, spec = seed_for(run.recipe, "classifier"), build.public_classifier_spec(run.recipe)
            public, device = inputs.public_data(run.recipe), run.recipe.performance.device
            save(path, train_classifier(public, spec=spec, seed=seed, device=device, progress=progress).cpu())

    run.ranks.first(train)
    return load(run, path, inputs.public_classes(run.recipe))


def extractor(run: Run, progress: Progress) -> Extractor:
    """What the scores look through: the file that the recipe names, or the classifier of the public images."""
    found, recipe = build.extractor_file(run.recipe), run.recipe
    if found is not None:
        return found
    name = extractor_name(recipe.data.public)
    return classifier_extractor(name, public_classifier(run, progress), device=recipe.performance.device)


def baseline_start(run: Run, progress: Progress) -> Classifier:
    """What the private classifier begins with: the public one, with a new last layer where the labels are others."""
    model = empty(run, run.private.classes)
    if run.recipe.baseline.pretrained:
        weights = public_classifier(run, progress).state_dict()
        if not inputs.shares_labels(run.recipe):
            weights |= {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(weights)
    return model


def empty(run: Run, classes: tuple[str, ...]) -> Classifier:
    """An untrained network for these classes; public and private images have one shape."""
    like = ImageSet(run.private.images[:0], run.private.labels[:0], classes)
    return build_classifier(like, ClassifierSpec(), seed=seed_for(run.recipe, "baseline"))


def save(path: Path, model: torch.nn.Module) -> None:
    """Write the weights; ``load`` reads them."""
    checkpoint.save(path, {"model": model.state_dict()}, kind="classifier", fingerprint="")


def load(run: Run, path: Path, classes: tuple[str, ...]) -> Classifier:
    """A classifier that ``save`` wrote, of these classes, in eval mode."""
    model = empty(run, classes)
    model.load_state_dict(checkpoint.load(path, kind="classifier", fingerprint="")["model"])
    return model.eval()
