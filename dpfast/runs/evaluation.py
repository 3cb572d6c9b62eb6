"""The stage that judges the samples: classifiers trained on them, scores of them, each kept as soon as it is known."""

from __future__ import annotations

from dataclasses import asdict

from dpfast.data import ImageSet
from dpfast.data.shards import load_shards
from dpfast.evaluation import accuracy, train_classifier
from dpfast.progress import Progress
from dpfast.runs import build, classifiers, inputs
from dpfast.runs.metrics import Results
from dpfast.runs.run import Run
from dpfast.runs.spent import spent_in_all


def evaluate(run: Run, progress: Progress) -> None:
    """Accuracies on the test images, and scores against the private ones."""
    at, results = run.directory, Results(run.directory.results)
    synthetic, public = load_shards(at.samples), load_shards(at.public_samples)
    _accuracies(run, results, synthetic, public, progress)
    _scores(run, results, {"synthetic": synthetic, "public_only": public}, progress)
    results["epsilon_composed"] = spent_in_all(run)


def _accuracies(run: Run, results: Results, synthetic: ImageSet, public: ImageSet, progress: Progress) -> None:
    from dpfast.evaluation.studies import accuracy_by_count

    recipe, test, seeds = run.recipe, inputs.test_data(run.recipe), build.classifier_seeds(run.recipe)
    spec, device = build.classifier_spec(recipe), recipe.performance.device
    studied = accuracy_by_count(
        synthetic,
        test,
        counts=build.counts(recipe),
        spec=spec,
        seeds=seeds,
        results=results,
        device=device,
        progress=progress,
    )
    results["accuracy_by_count"] = [asdict(point) for point in studied]
    for name, images in (("public_only", public), ("real", run.private)):
        for index, seed in enumerate(seeds):
            key = f"accuracy.{name}.{index}"
            if key not in results:
                model = train_classifier(images, spec=spec, seed=seed, device=device, progress=progress)
                results[key] = accuracy(model, test)
    if inputs.shares_labels(recipe):
        results["accuracy.public_classifier"] = accuracy(classifiers.public_classifier(run, progress), test)
    rival = classifiers.load(run, run.directory.baseline / "model", run.private.classes)
    results["accuracy.dp_classifier"] = accuracy(rival, test)


def _scores(run: Run, results: Results, sets: dict[str, ImageSet], progress: Progress) -> None:
    from dpfast.evaluation.scores import ScoreSettings, image_scores

    extractor = classifiers.extractor(run, progress)
    for name, images in sets.items():
        if f"scores.{name}" not in results:
            settings = ScoreSettings.fitting(min(len(run.private), len(images)))
            scores = image_scores(
                extractor, run.private, images, settings=settings, folder=run.directory.state, progress=progress
            )
            results[f"scores.{name}"] = scores.to_dict()
