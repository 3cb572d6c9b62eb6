"""What each stage does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dpfast.data.shards import ShardFolder, open_shards
from dpfast.diffusion.finetune import merge
from dpfast.diffusion.loading import load_unet
from dpfast.diffusion.pretrain import pretrain as pretrain_model
from dpfast.errors import FileError
from dpfast.files import follow_umask, make_folder, read_json, write_atomic, write_json
from dpfast.progress import Progress
from dpfast.recipes import Recipe, fingerprint, to_toml
from dpfast.report.figures import contact_sheet
from dpfast.report.internal import InternalReport
from dpfast.report.page import COLUMNS
from dpfast.report.release import ReleaseReport
from dpfast.runs import build, classifiers, inputs
from dpfast.runs.metrics import gather_metrics
from dpfast.runs.run import Run
from dpfast.runs.seeds import seed_for
from dpfast.runs.spent import baseline_statement, model_statement

GRID_COLUMNS = 20


def pretrain(run: Run, progress: Progress) -> None:
    """Ordinary training on public images."""
    recipe, stage = run.recipe, run.stages["pretrain"]
    if not recipe.pretrain.steps:
        run.ranks.first(lambda: _keep_public(run, build.initial_unet(recipe, run.private), []))
        return
    public = inputs.public_data(recipe)
    model = build.initial_unet(recipe, public).to(recipe.performance.device)
    losses = pretrain_model(
        model,
        build.public_objective(recipe, public),
        public,
        build.pretrain_spec(recipe),
        checkpoint=stage.folder / "checkpoint",
        fingerprint=fingerprint(stage.parts),
        dtype=recipe.performance.dtype,
        progress=progress,
        ranks=run.ranks,
    )
    if not inputs.shares_labels(recipe):
        model = build.relabelled(recipe, model, run.private)
    run.ranks.first(lambda: _keep_public(run, model.cpu(), losses))


def _keep_public(run: Run, model: Any, losses: list[float]) -> None:
    _save_model(model, run.directory.public_model)
    write_json(run.directory.losses, losses)


def train(run: Run, progress: Progress) -> None:
    """DP-SGD fine-tuning on the private images; the averaged weights are what is released."""
    recipe, at = run.recipe, run.directory
    trainer = build.private_trainer(
        recipe,
        recipe.private,
        build.tuned(recipe, load_unet(at.public_model)),
        run.private,
        run.plan,
        build.private_objective(recipe, run.private),
        seed=seed_for(recipe, "private"),
        state_dir=at.training,
        progress=progress,
        unsafe_debug=recipe.private.unsafe_debug,
        ranks=run.ranks,
    )
    trainer.fit()
    run.ranks.first(lambda: _keep_private(run, merge(trainer.ema_model.cpu())))


def _keep_private(run: Run, model: Any) -> None:
    """What is released of the training."""
    at = run.directory
    _save_model(model, at.model)
    build.scheduler(run.recipe).save_pretrained(at.model)
    classes = run.private.classes
    write_json(at.model / "classes.json", {"classes": list(classes), "no class (guidance)": len(classes)})
    for folder in (at.model, at.release):
        model_statement(run).write(folder)


def _save_model(model: Any, folder: Path) -> None:
    make_folder(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # of the operating system, too
        raise FileError(f"cannot write {folder}: {error}. Make room, then run again") from error
    follow_umask(folder)  # safetensors makes its file readable to its owner alone


def sample(run: Run, progress: Progress) -> None:
    """Synthetic images of the private model (released) and of the public one (to compare)."""
    at = run.directory
    samples = draw_samples(run, run.recipe, at.model, at.samples, progress)

    def show() -> None:
        rows = samples.heads(GRID_COLUMNS)
        write_atomic(at.samples / "grid.png", contact_sheet([r for r in rows if len(r)], scale=4))
        model_statement(run).write(at.samples)

    run.ranks.first(show)
    draw_samples(run, run.recipe, at.public_model, at.public_samples, progress)


def draw_samples(
    run: Run, recipe: Recipe, model: Path, folder: Path, progress: Progress, *, part: str = "sample"
) -> ShardFolder:
    """Samples of a saved model as ``recipe`` says. part: whose seed they are drawn from (``seeds.SEEDS``)."""
    return build.sampling(recipe, part).shards(
        load_unet(model).to(recipe.performance.device),
        folder=folder,
        image_shape=run.private.image_shape,
        classes=run.private.classes,
        progress=progress,
        ranks=run.ranks,
    )


def baseline(run: Run, progress: Progress) -> None:
    """A DP-SGD classifier with a ledger of its own: what the same budget buys without a generator."""
    recipe, at = run.recipe, run.directory
    model = classifiers.baseline_start(run, progress)
    trainer = build.private_trainer(
        recipe,
        recipe.baseline,
        model,
        run.private,
        run.baseline_plan,
        build.classifier_objective(recipe),
        seed=seed_for(recipe, "baseline"),
        state_dir=at.baseline,
        progress=progress,
        ranks=run.ranks,
    )
    trainer.fit()

    def keep() -> None:
        classifiers.save(at.baseline / "model", trainer.ema_model.cpu())
        baseline_statement(run).write(at.baseline)

    run.ranks.first(keep)


def report(run: Run, progress: Progress) -> None:
    """Both reports and the metrics."""
    progress(0, 1, "writing")
    at, metrics = run.directory, gather_metrics(run)
    seconds = {name: stage.seconds for name, stage in run.stages.items() if name != "report"}
    write_atomic(at.release_report, _release_report(run).html())
    write_atomic(at.internal_report, _internal_report(run, metrics, seconds).html())
    write_json(at.metrics, metrics | {"seconds": seconds})


def _release_report(run: Run) -> ReleaseReport:
    samples, public = open_shards(run.directory.samples), open_shards(run.directory.public_samples)
    made_it = [run.stages[name] for name in ("pretrain", "train", "sample")]
    return ReleaseReport(
        name=run.recipe.name,
        statement=model_statement(run),
        samples=samples.first(COLUMNS),
        public_samples=public.first(COLUMNS),
        count=len(samples.labels),
        losses=read_json(run.directory.losses, cure="delete it and run the same command again"),
        epsilon_curve=run.plan.epsilon_curve(points=16, early=True) if run.plan.is_private else [],
        before=_before(run),
        recipe=to_toml(build.without_paths(run.recipe)),
        seconds={stage.title: stage.seconds for stage in made_it},
    )


def _before(run: Run) -> str:
    """What the model knew before private training, to complete a sentence."""
    pretrain = run.recipe.pretrain
    if not pretrain.steps:
        return "nothing: there was no pre-training" if pretrain.weights is None else "what its first weights knew"
    return "public images only" if inputs.shares_labels(run.recipe) else "public images only, and none of these classes"


def _internal_report(run: Run, metrics: dict[str, Any], seconds: dict[str, float]) -> InternalReport:
    return InternalReport(
        name=run.recipe.name,
        metrics=metrics,
        private=run.private,
        samples=open_shards(run.directory.samples).first(COLUMNS),
        seconds={run.stages[name].title: value for name, value in seconds.items()},
        recipe=to_toml(run.recipe),
    )
