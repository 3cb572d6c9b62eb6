"""What each stage does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpfast import checkpoint
from dpfast.data import ImageSet
from dpfast.data.shards import load_shards
from dpfast.diffusion.pretrain import pretrain as pretrain_model
from dpfast.diffusion.sampler import generate_shards
from dpfast.evaluation import (
    ClassifierObjective,
    ClassifierSpec,
    SmallCNN,
    accuracy,
    build_classifier,
    train_classifier,
)
from dpfast.files import write_atomic, write_json
from dpfast.objective import Objective
from dpfast.privacy.plan import Plan, composed_epsilon
from dpfast.progress import Progress
from dpfast.recipes import fingerprint, parts
from dpfast.recipes.schema import Baseline, Private
from dpfast.report.figures import contact_sheet
from dpfast.runs import build
from dpfast.runs.pipeline import Run
from dpfast.runs.statements import spent, statement

GRID_COLUMNS = 20


def pretrain(run: Run, progress: Progress) -> None:
    """Ordinary training on public images."""
    recipe, stage = run.recipe, run.stages["pretrain"]
    public = build.public_data(recipe)
    model = build.unet(recipe, public).to(recipe.performance.device)
    losses = pretrain_model(
        model,
        build.public_objective(recipe, public),
        public,
        build.pretrain_spec(recipe),
        checkpoint=stage.folder / "checkpoint",
        fingerprint=fingerprint(stage.parts),
        progress=progress,
    )
    model.cpu().save_pretrained(run.public_model)
    write_json(run.losses, losses)


def train(run: Run, progress: Progress) -> None:
    """DP-SGD fine-tuning on the private images; the averaged weights are what is released."""
    recipe, stage = run.recipe, run.stages["train"]
    model, objective = build.load_unet(run.public_model), build.private_objective(recipe, run.private)
    released: Any = _train_privately(
        run, model, run.plan, recipe.private, objective, seed="private", folder=stage.folder, progress=progress
    )
    released.save_pretrained(run.model)
    build.scheduler(recipe).save_pretrained(run.model)
    for folder in (run.model, run.directory.release):
        statement(run).write(folder)


def _train_privately(
    run: Run,
    model: torch.nn.Module,
    plan: Plan,
    training: Private | Baseline,
    objective: Objective,
    *,
    seed: str,
    folder: Path,
    progress: Progress,
) -> torch.nn.Module:
    """The averaged weights after every step of ``plan``, on the CPU; ledger and checkpoint are in ``folder``."""
    from dpfast.trainer import DPTrainer

    trainer = DPTrainer(
        model.train(),
        run.private,
        plan,
        objective=objective,
        optimizer=build.adam(training.learning_rate),
        augmult=training.augmult,
        seed=build.seed_for(run.recipe, seed),
        performance=build.performance(run.recipe),
        state_dir=folder,
        ema_decay=training.ema_decay,
        warmup_steps=training.warmup_steps,
        progress=progress,
    )
    trainer.fit()
    return trainer.ema_model.cpu()


def sample(run: Run, progress: Progress) -> None:
    """Synthetic images of the private model (released) and of the public one (to compare)."""
    for model, folder in ((run.model, run.samples), (run.public_model, run.public_samples)):
        images = _generate(run, model, folder, progress)
        if folder == run.samples:
            rows = [images.images[images.labels == c][:GRID_COLUMNS] for c in range(images.num_classes)]
            write_atomic(folder / "grid.png", contact_sheet([r for r in rows if len(r)], scale=4))
            statement(run).write(folder)


def _generate(run: Run, model: Path, folder: Path, progress: Progress) -> ImageSet:
    recipe = run.recipe
    return generate_shards(
        build.load_unet(model).to(recipe.performance.device),
        build.scheduler(recipe),
        folder,
        count=recipe.sample.count,
        shard_size=recipe.sample.shard_size,
        image_shape=run.private.image_shape,
        classes=run.private.classes,
        sampler=recipe.sample.sampler,
        steps=recipe.sample.steps,
        guidance=recipe.sample.guidance,
        seed=build.seed_for(recipe, "sample"),
        batch_size=recipe.sample.batch_size,
        progress=progress,
    )


def baseline(run: Run, progress: Progress) -> None:
    """A DP-SGD classifier with a ledger of its own: what the same budget buys without a generator."""
    recipe = run.recipe
    model = public_classifier(run, progress) if recipe.baseline.pretrained else _empty_classifier(run)
    objective = ClassifierObjective(augment=build.classifier_augment(recipe))
    trained = _train_privately(
        run,
        model,
        run.baseline_plan,
        recipe.baseline,
        objective,
        seed="baseline",
        folder=run.baseline,
        progress=progress,
    )
    _save_classifier(run.baseline / "model", trained)
    statement(run, baseline=True).write(run.baseline)


def evaluate(run: Run, progress: Progress) -> None:
    """Accuracies on the test images and Frechet distances; each result is kept as soon as it is known."""
    from dpfast.evaluation.frechet import EXTRACTOR, frechet_distance

    recipe, results = run.recipe, Results(run.stages["evaluate"].folder / "results.json")
    test = build.test_data(recipe)
    synthetic, public = load_shards(run.samples), load_shards(run.public_samples)
    for name, images in (("synthetic", synthetic), ("public_only", public), ("real", run.private)):
        for index in range(recipe.evaluate.seeds):
            key = f"accuracy.{name}.{index}"
            if key not in results:
                seed = build.seed_for(recipe, "classifier") + 100 * index
                model = train_classifier(images, spec=build.classifier_spec(recipe), seed=seed, progress=progress)
                results[key] = accuracy(model, test)
    extractor = public_classifier(run, progress)
    results["accuracy.public_classifier"] = accuracy(extractor, test)
    results["accuracy.dp_classifier"] = accuracy(_load_classifier(run, run.baseline / "model"), test)
    for name, images in (("synthetic", synthetic), ("public_only", public)):
        results[f"frechet.{name}"] = frechet_distance(extractor, run.private, images)
    results["frechet.extractor"] = EXTRACTOR
    both = [(ledger.plan, ledger.charged_steps) for ledger in (spent(run), spent(run, baseline=True))]
    results["epsilon_composed"] = composed_epsilon(both, target_delta=run.plan.target_delta)


class Results:
    """Named results in a JSON file that is rewritten with each new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, float | str] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __setitem__(self, key: str, value: float | str) -> None:
        self.values[key] = value
        write_json(self._path, self.values)


def public_classifier(run: Run, progress: Progress) -> SmallCNN:
    """The classifier of the public images: feature extractor, and where the private classifier starts."""
    keys = ("seed", "data.public", "data.public_count", "evaluate.extractor_steps")
    key = fingerprint(parts(run.recipe, *keys))
    path = run.directory.state / f"public-classifier-{key}"
    if not path.exists():
        seed, spec = build.seed_for(run.recipe, "classifier"), build.public_classifier_spec(run.recipe)
        public = build.public_data(run.recipe)
        _save_classifier(path, train_classifier(public, spec=spec, seed=seed, progress=progress))
    return _load_classifier(run, path)


def _save_classifier(path: Path, model: torch.nn.Module) -> None:
    checkpoint.save(path, {"model": model.state_dict()}, kind="classifier", fingerprint="")


def _load_classifier(run: Run, path: Path) -> SmallCNN:
    model = _empty_classifier(run)
    model.load_state_dict(checkpoint.load(path, kind="classifier", fingerprint="")["model"])
    return model.eval()


def _empty_classifier(run: Run) -> SmallCNN:
    seed = build.seed_for(run.recipe, "baseline")
    return build_classifier(run.private, ClassifierSpec(), seed=seed)


def report(run: Run, progress: Progress) -> None:
    """Both reports and the metrics."""
    from dpfast.runs.reports import write_reports

    progress(0, 1, "writing")
    write_reports(run)


STAGES = {
    "pretrain": pretrain,
    "train": train,
    "sample": sample,
    "baseline": baseline,
    "evaluate": evaluate,
    "report": report,
}
