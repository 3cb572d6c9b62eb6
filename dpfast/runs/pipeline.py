"""A run from recipe to reports, stage by stage. Any stage may be interrupted; the same call goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dpfast.data import ImageSet
from dpfast.errors import ConfigError
from dpfast.files import remove, write_atomic, write_json
from dpfast.privacy.plan import Plan
from dpfast.recipes import fingerprint, parts, to_toml
from dpfast.recipes.schema import Recipe
from dpfast.runs import build
from dpfast.runs.directory import RunDirectory
from dpfast.runs.progress import Reporter, duration
from dpfast.runs.stages import Stage

ORDER = ("pretrain", "train", "sample", "baseline", "evaluate", "report")


@dataclass(frozen=True)
class Run:
    """What every stage works with."""

    recipe: Recipe
    directory: RunDirectory
    plan: Plan
    private: ImageSet
    stages: dict[str, Stage]

    @cached_property
    def baseline_plan(self) -> Plan:
        return build.baseline_plan(self.recipe, len(self.private))

    @property
    def public_model(self) -> Path:
        return self.stages["pretrain"].folder / "model"

    @property
    def losses(self) -> Path:
        return self.stages["pretrain"].folder / "losses.json"

    @property
    def model(self) -> Path:
        return self.directory.release / "model"

    @property
    def samples(self) -> Path:
        return self.directory.release / "samples"

    @property
    def public_samples(self) -> Path:
        return self.stages["sample"].folder / "public"

    @property
    def baseline(self) -> Path:
        return self.directory.internal / "baselines" / "dp_classifier"


def open_run(recipe: Recipe, runs: Path) -> Run:
    """The run of ``recipe`` in the folder ``runs``, checked as far as that needs no work. Nothing is written.

    Raises:
        ConfigError: a value that a later stage would stumble over, or one that differs from what this run has
            already spent budget on.
    """
    directory = RunDirectory(runs / recipe.name, private=math.isfinite(recipe.private.target_epsilon))
    private = build.private_data(recipe)
    _preflight(recipe, private)
    stages = _stages(recipe, directory, private.fingerprint())
    for stage in stages.values():
        stage.check()
    return Run(
        recipe=recipe,
        directory=directory,
        plan=build.plan(recipe, len(private)),
        private=private,
        stages=stages,
    )


def execute(recipe: Recipe, runs: Path, reporter: Reporter, *, until: str = "report") -> Run:
    """Do every stage up to ``until`` that is not done yet.

    Raises:
        RunLocked: another process works on this run.
        ConfigError: see ``open_run``.
    """
    from dpfast.runs import work

    directory = RunDirectory(runs / recipe.name)
    with directory.locked():
        run = open_run(recipe, runs)
        write_atomic(directory.recipe, to_toml(recipe))
        for name in ORDER[: ORDER.index(until) + 1]:
            _do(run, name, work.STAGES[name], reporter)
    return run


def _do(run: Run, name: str, act: Callable[..., None], reporter: Reporter) -> None:
    stage = run.stages[name]
    if name == "report":
        remove(stage.folder)  # cheap, and its inputs include the other stages' times: written anew every time
    elif stage.done():
        reporter.say(f"{name}: done before")
        return
    reporter.say(f"{name} ...")
    reporter.stage(name, resumed=stage.begun())
    with stage.working(reporter) as progress:
        act(run, progress)
    reporter.close()
    if name == "report":
        _write_seconds(run)
    reporter.say(f"{name}: done in {duration(stage.seconds)}")


def _write_seconds(run: Run) -> None:
    """The one figure that is known only when the report is written."""
    path = run.directory.internal / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["seconds"] = {name: stage.seconds for name, stage in run.stages.items()}
    write_json(path, metrics)


def _stages(recipe: Recipe, directory: RunDirectory, private_fingerprint: str) -> dict[str, Stage]:
    """Every stage with the recipe parts that it depends on, its own and those of the stages before it."""
    state, release = directory.state, directory.release
    private = {"private images": private_fingerprint}
    budget = ("private.target_epsilon", "private.target_delta", "private.neighboring")
    pretrain = parts(recipe, "seed", "model", "diffusion", "pretrain", "data.public", "data.public_count")
    train = pretrain | parts(recipe, "data", "private") | private
    sample = train | parts(recipe, "sample")
    baseline = parts(recipe, "seed", "data", "baseline", *budget) | private
    if recipe.baseline.pretrained:
        baseline |= parts(recipe, "evaluate.extractor_steps", "data.public", "data.public_count")
    evaluate = sample | baseline | parts(recipe, "evaluate")

    def stage(name: str, values: dict[str, object], *outputs: Path, ledger: Path | None = None) -> Stage:
        return Stage(name, state / name, values, outputs=outputs, ledger=ledger)

    rival = directory.internal / "baselines" / "dp_classifier"
    stages = [
        stage("pretrain", pretrain),
        stage("train", train, release / "model", ledger=state / "train" / "ledger.jsonl"),
        stage("sample", sample, release / "samples"),
        stage("baseline", baseline, rival, ledger=rival / "ledger.jsonl"),
        stage("evaluate", evaluate),
        stage("report", evaluate),
    ]
    return {entry.name: entry for entry in stages}


def _preflight(recipe: Recipe, private: ImageSet) -> None:
    """Refuse now what would otherwise fail after hours, or after the budget is spent."""
    from dpfast.diffusion.sampler import sampling_scheduler

    if recipe.sample.count % private.num_classes:
        raise ConfigError(
            f"recipe key sample.count = {recipe.sample.count}: expected a multiple of the"
            f" {private.num_classes} classes, so that each gets the same number of images"
        )
    build.private_objective(recipe, private)
    build.timesteps(recipe).icdf(torch.zeros(1), recipe.diffusion.num_train_timesteps)
    sampling_scheduler(build.scheduler(recipe), recipe.sample.sampler, recipe.sample.steps)
    build.unet(recipe, private)
    build.pretrain_spec(recipe)


def run_fingerprint(run: Run) -> str:
    """Of everything that the released pipeline depends on."""
    return fingerprint(run.stages["sample"].parts)
