"""The measurements of a run's samples: classifiers trained on them, scores of them, each kept as soon as it is known.

Each is a task that ranks take as they become free.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from dpfast.data import ImageSet
from dpfast.data.shards import load_shards
from dpfast.evaluation import accuracy, train_classifier
from dpfast.evaluation.extractors import Extractor
from dpfast.evaluation.tasks import Task, work_off
from dpfast.files import read_json, remove
from dpfast.progress import Progress
from dpfast.runs import build, classifiers, inputs
from dpfast.runs.metrics import Results
from dpfast.runs.run import Run
from dpfast.runs.spent import spent_in_all


def evaluate(run: Run, progress: Progress) -> None:
    """Accuracies on the test images, and scores against the private ones."""
    from dpfast.evaluation.studies import CountStudy

    recipe, at, test = run.recipe, run.directory, inputs.test_data(run.recipe)
    results = _results(run)
    synthetic, public = load_shards(at.samples), load_shards(at.public_samples)
    extractor = classifiers.extractor(run, progress)
    reader = classifiers.public_classifier(run, progress) if inputs.shares_labels(recipe) else None
    by_count = CountStudy(
        synthetic,
        test,
        counts=build.counts(recipe),
        spec=build.classifier_spec(recipe),
        seeds=build.classifier_seeds(recipe),
        device=recipe.performance.device,
        progress=progress,
    )
    tasks = by_count.tasks()
    for name, images in (("public_only", public), ("real", run.private)):
        tasks |= _accuracies(run, name, images, test, progress)
    for name, images in (("synthetic", synthetic), ("public_only", public)):
        tasks[f"scores.{name}"] = partial(_scores, run, name, images, extractor, progress)
    work_off(tasks, results, run.ranks)

    def conclude() -> None:
        results["accuracy_by_count"] = [asdict(point) for point in by_count.found(results)]
        if reader is not None:
            results["accuracy.public_classifier"] = accuracy(reader, test)
        rival = classifiers.load(run, at.baseline / "model", run.private.classes)
        results["accuracy.dp_classifier"] = accuracy(rival, test)
        results["epsilon_composed"] = spent_in_all(run)
        _remove_parts(run)

    run.ranks.first(conclude)


def _accuracies(run: Run, name: str, images: ImageSet, test: ImageSet, progress: Progress) -> dict[str, Task]:
    """Of a classifier trained on ``images``, for each seed."""
    spec, device = build.classifier_spec(run.recipe), run.recipe.performance.device

    def measure(key: str, seed: int) -> dict[str, float]:
        model = train_classifier(images, spec=spec, seed=seed, device=device, progress=progress)
        return {key: accuracy(model, test)}

    keys = {f"accuracy.{name}.{index}": seed for index, seed in enumerate(build.classifier_seeds(run.recipe))}
    return {key: partial(measure, key, seed) for key, seed in keys.items()}


def _scores(run: Run, name: str, images: ImageSet, extractor: Extractor, progress: Progress) -> dict[str, object]:
    from dpfast.evaluation.scores import ScoreSettings, image_scores

    settings = ScoreSettings.fitting(min(len(run.private), len(images)))
    scores = image_scores(
        extractor, run.private, images, settings=settings, folder=run.directory.state, progress=progress
    )
    return {f"scores.{name}": scores.to_dict()}


_CURE = "delete it and run the same command again: what it held is measured again"


def _results(run: Run) -> Results:
    """Rank 0's are those of the run. What another rank finds is kept in a file of that rank until rank 0 has it: a kill
    loses nothing of it.
    """

    def gather() -> None:
        results = Results(run.directory.results)
        for path in _parts(run):
            for key, value in read_json(path, cure=_CURE).items():
                results[key] = value
        _remove_parts(run)

    run.ranks.first(gather)
    if run.ranks.leads:
        return Results(run.directory.results)
    return Results(run.stages["evaluate"].folder / f"rank-{run.ranks.rank}.json", cure=_CURE)


def _parts(run: Run) -> list[Path]:
    return sorted(run.stages["evaluate"].folder.glob("rank-*.json"))


def _remove_parts(run: Run) -> None:
    for path in _parts(run):
        remove(path)
