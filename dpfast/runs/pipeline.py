"""A run from recipe to reports, stage by stage. Any stage may be interrupted; the same call goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpfast.clipping.rule import ClipRule
from dpfast.data import ImageSet
from dpfast.errors import ConfigError
from dpfast.files import remove, write_atomic, write_json
from dpfast.progress import Progress, duration, silent
from dpfast.ranks import Ranks
from dpfast.recipes import defaults, fingerprint, parts, to_toml
from dpfast.recipes.schema import Recipe
from dpfast.runs import build, evaluation, inputs, work
from dpfast.runs.directory import RunDirectory
from dpfast.runs.metrics import read_metrics
from dpfast.runs.run import Run
from dpfast.runs.stages import Stage
from dpfast.runs.terminal import TerminalProgress

_WHO_SAMPLES = ("sample.devices", "sample.compile")


def open_run(recipe: Recipe, runs: Path, *, elsewhere: bool = False, ranks: Ranks | None = None) -> Run:
    """The run of ``recipe`` in the folder ``runs``, checked as far as that needs no work. Nothing is written.

    elsewhere: it will not be carried out here, where its device may be missing, and data (``inputs.planned``).
    ranks: who will carry it out; this process alone by default.

    Raises:
        ConfigError: a value that a later stage would stumble over, or one that differs from what this run has
            already spent budget on.
    """
    if elsewhere:
        recipe = inputs.planned(recipe)
    elif inputs.is_planned(recipe):
        raise ConfigError(
            f"recipe keys data.private = {recipe.data.private!r}, data.public = {recipe.data.public!r}:"
            f" {inputs.ZEROS[:-1]} are to plan with (--dry-run); name stores"
        )
    directory = RunDirectory(runs / recipe.name, private=math.isfinite(recipe.private.target_epsilon))
    private = inputs.private_data(recipe)
    _preflight(recipe, private)
    _check_device(recipe.performance.device, elsewhere=elsewhere)
    ranks = ranks or Ranks.alone()
    if ranks.size > 1 and recipe.sample.devices:
        raise ConfigError(
            f"recipe key sample.devices = {list(recipe.sample.devices)}: expected none where several processes share"
            " the work, each on a device of its own: --set sample.devices=[]"
        )
    stages = _stages(recipe, directory, private)
    for stage in stages.values():
        stage.check()
    plan = build.plan(recipe, len(private))
    return Run(recipe=recipe, directory=directory, plan=plan, private=private, stages=stages, ranks=ranks)


def execute(
    recipe: Recipe, runs: Path, terminal: TerminalProgress, *, until: str = "report", ranks: Ranks | None = None
) -> Run:
    """Do every stage up to ``until`` that is not done yet.

    ranks: ``torch.distributed``'s processes by default, which do it together: all of them call this with the same
    arguments, and see the same files. Rank 0 is heard.

    Raises:
        RunLocked: another process works on this run.
        ConfigError: see ``open_run``; or ranks that see different files.
    """
    ranks = ranks or Ranks.current()
    with _locked(RunDirectory(runs / recipe.name), ranks):
        return advance(recipe, runs, terminal, until=until, ranks=ranks)


def advance(recipe: Recipe, runs: Path, terminal: TerminalProgress, *, until: str, ranks: Ranks | None = None) -> Run:
    """The same for who holds the lock of the run; by default for this process alone."""
    run = _open_together(recipe, runs, ranks or Ranks.alone())
    names = list(run.stages)
    wanted = names[: names.index(until) + 1]

    def prepare() -> None:
        run.directory.mark()
        write_atomic(run.directory.recipe, to_toml(recipe))
        if not all(run.stages[name].done() for name in wanted):
            inputs.verify(recipe)

    run.ranks.first(prepare)
    for name in wanted:
        _do(run, run.stages[name], terminal)
    return run


@contextmanager
def _locked(directory: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """Hold the run, on rank 0. Raises ConfigError where the others do not see its folder."""
    with ExitStack() as stack:

        def lock() -> str:
            stack.enter_context(directory.locked())
            return directory.owner()

        owner = ranks.first(lock)
        seen = ranks.tell(directory.owner() == owner)
        if not all(seen):
            raise ConfigError(
                f"rank {seen.index(False)} does not see what rank 0 writes to {directory.root}: expected a folder on a"
                " file system that all ranks share; name one (--runs)"
            )
        yield


def _open_together(recipe: Recipe, runs: Path, ranks: Ranks) -> Run:
    """The run on every rank, by the same records, which nobody has changed yet."""
    if ranks.size == 1:
        return open_run(recipe, runs, ranks=ranks)
    opened: list[Run] = []
    ranks.first(lambda: opened.append(open_run(recipe, runs, ranks=ranks)))  # what is refused, is refused once
    run = opened[0] if opened else open_run(recipe, runs, ranks=ranks)
    parts_of_all = fingerprint({name: stage.parts for name, stage in run.stages.items()})
    ranks.alike("recipe or images", parts_of_all, "Give all ranks the same, on a file system that they share")
    return run


def sample_parts(recipe: Recipe) -> dict[str, Any]:
    """What of [sample] the images depend on: not who draws them."""
    return {key: value for key, value in parts(recipe, "sample").items() if key not in _WHO_SAMPLES}


def _do(run: Run, stage: Stage, terminal: TerminalProgress) -> None:
    if not run.ranks.first(lambda: _is_due(run, stage, terminal)):
        return
    with _working(run, stage, terminal) as progress:
        if stage.shared:
            stage.act(run, progress)
        else:
            run.ranks.first(lambda: stage.act(run, progress))
    if run.ranks.leads:
        terminal.close()
        if stage.name == "report":
            _write_seconds(run)
        terminal.say(f"{stage.name}: done in {duration(stage.seconds)}")


def _is_due(run: Run, stage: Stage, terminal: TerminalProgress) -> bool:
    """Whether it is to be done now, for which all is made ready then."""
    if stage.name == "report":
        remove(stage.folder)  # cheap, and its inputs include the other stages' times: written anew every time
    elif stage.done():
        terminal.say(f"{stage.name}: done before")
        return False
    else:
        for path in run.stages["report"].outputs:  # they would describe what is about to change
            remove(path)
    terminal.say(f"{stage.name} ...")
    terminal.stage(stage.name, resumed=stage.begun())
    return True


@contextmanager
def _working(run: Run, stage: Stage, terminal: TerminalProgress) -> Iterator[Progress]:
    """``stage.working`` on rank 0. All enter together, and none leaves before it is recorded as done."""
    with ExitStack() as stack:
        progress: Progress = silent

        def begin() -> None:
            nonlocal progress
            progress = stack.enter_context(stage.working(terminal))

        run.ranks.first(begin)
        yield progress
        run.ranks.wait()
    run.ranks.wait()


def _write_seconds(run: Run) -> None:
    """The one figure that is known only when the report is written."""
    seconds = {name: stage.seconds for name, stage in run.stages.items()}
    write_json(run.directory.metrics, read_metrics(run) | {"seconds": seconds})


def _stages(recipe: Recipe, at: RunDirectory, private: ImageSet) -> dict[str, Stage]:
    """Every stage, in order, with the recipe parts that it depends on: its own and those of the stages before it.

    The images themselves are such a part: other ones are refused, once budget is spent, like other settings.
    """
    images = {"private images": private.fingerprint()}
    budget = ("private.target_epsilon", "private.target_delta", "private.neighboring")
    public = parts(recipe, "data.public", "data.public_count") | inputs.public_identity(recipe)
    pretrain = parts(recipe, "seed", "model", "diffusion", "pretrain", "performance.dtype") | public
    pretrain |= build.initial_identity(recipe)
    pretrain |= {"private shape": list(private.image_shape), "private classes": list(private.classes)}
    train = pretrain | parts(recipe, "data.private", "data.fold", "private") | images
    sample = train | sample_parts(recipe)
    baseline = parts(recipe, "seed", "data.private", "data.fold", "baseline", "performance.dtype", *budget) | images
    if recipe.baseline.pretrained:
        baseline |= parts(recipe, "evaluate.extractor_steps") | public
    evaluate = sample | baseline | parts(recipe, "evaluate") | {"test images": inputs.test_data(recipe).fingerprint()}
    evaluate |= build.extractor_identity(recipe)
    reports = [at.release_report, at.internal_report, at.metrics]

    def stage(act: Callable[..., None], values: dict[str, Any], outputs: list[Path], **options: Any) -> Stage:
        name = act.__name__
        return Stage(name, at.state / name, values, act=act, outputs=outputs, defaults=defaults(values), **options)

    shared = partial(stage, shared=True)
    stages = (
        shared(work.pretrain, pretrain, [at.public_model, at.losses], title="pre-training on public images"),
        shared(work.train, train, [at.model], title="private training", ledger=at.ledger),
        shared(work.sample, sample, [at.samples, at.public_samples], title="drawing samples"),
        shared(work.baseline, baseline, [at.baseline], title="baseline classifier", ledger=at.baseline_ledger),
        shared(evaluation.evaluate, evaluate, [at.results], title="evaluation"),
        stage(work.report, evaluate, reports, title="reports"),
    )
    return {entry.name: entry for entry in stages}


def _preflight(recipe: Recipe, private: ImageSet) -> None:
    """Refuse now what would otherwise fail after hours, or after the budget is spent."""
    if recipe.sample.count % private.num_classes:
        raise ConfigError(
            f"recipe key sample.count = {recipe.sample.count}: expected a multiple of the"
            f" {private.num_classes} classes, so that each gets the same number of images"
        )
    _check_public(recipe, private)
    _check_moves(recipe, private)
    _check_process(recipe)
    build.private_objective(recipe, private)
    build.timesteps(recipe).icdf(torch.zeros(1), recipe.diffusion.num_train_timesteps)
    build.sampling(recipe)
    build.tuned(recipe, build.unet(recipe, private))
    build.classifier_spec(recipe)
    build.counts(recipe)
    build.extractor_file(recipe)
    ClipRule.of(recipe.private.max_grad_norm, recipe.private.clipping, recipe.private.stability)
    if recipe.pretrain.weights is not None:
        build.initial_unet(recipe, private)
    if recipe.pretrain.steps:
        build.pretrain_spec(recipe)


def _check_public(recipe: Recipe, private: ImageSet) -> None:
    """What the model is pre-trained on is not private, and has the shape of what it is fine-tuned on."""
    shape, name = private.image_shape, recipe.data.public
    if name == "digits" or name == recipe.data.private or inputs.shares_images(recipe):
        raise ConfigError(
            f"recipe key data.public = {name!r}: these are the private or the test images; pre-training would use them"
            " without any protection. Name public ones"
        )
    if recipe.data.public == "fonts":
        if not recipe.data.public_count:
            raise ConfigError("recipe key data.public_count = 0: expected how many fonts to render; 0 is for stores")
        if shape[0] != 1 or shape[1] != shape[2]:
            raise ConfigError(f'recipe key data.public = "fonts": they are grey and square, private images {shape}')
        return
    public, count = inputs.public_store(recipe), recipe.data.public_count
    if count > len(public):
        raise ConfigError(f"recipe key data.public_count = {count}: there are {len(public)}; 0 is for all")
    if public.image_shape != shape:
        raise ConfigError(
            f"recipe key data.public = {name!r}: its images are {public.image_shape}, the private ones {shape};"
            f" prepare one of the stores anew with dpfast data prepare ... --size {shape[-1]}"
        )


def _check_moves(recipe: Recipe, private: ImageSet) -> None:
    """Random crops keep something of an image."""
    side = min(private.image_shape[1:])
    moves = {"private.shift": recipe.private.shift, "baseline.shift": recipe.baseline.shift}
    for key, pixels in (moves | {"evaluate.crop": recipe.evaluate.crop}).items():
        if pixels >= side:
            raise ConfigError(f"recipe key {key} = {pixels}: expected less than the {side} pixels of an image's side")


def _check_process(recipe: Recipe) -> None:
    """DDPM has timesteps, and samplers that walk them; EDM has neither."""
    process, sampler, mixture = recipe.diffusion.process, recipe.sample.sampler, recipe.private.timesteps
    samplers, other = (("heun",), "ddpm") if process == "edm" else (("ddim", "ddpm"), "edm")
    if sampler not in samplers:
        raise ConfigError(
            f"recipe key sample.sampler = {sampler!r}: expected {' or '.join(map(repr, samplers))} where"
            f" diffusion.process = {process!r}: --set sample.sampler={samplers[0]}, or --set diffusion.process={other}"
        )
    if process == "edm" and mixture:
        raise ConfigError(
            f"recipe key private.timesteps = {[list(part) for part in mixture]}: expected [] where"
            " diffusion.process = 'edm', whose noise levels are those of p_mean and p_std: --set private.timesteps=[]"
        )


def _check_device(name: str, *, elsewhere: bool) -> None:
    """Put a number there and take it back: what that says is the one reliable answer. elsewhere: that it is a name."""
    try:
        device = torch.device(name)
        if not elsewhere:
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"recipe key performance.device = {name!r}: it cannot be used here ({reason}). Expected a device that"
            ' torch reaches, such as "cpu" or "cuda" (`dpfast doctor` lists them): --set performance.device=cpu'
        ) from error
