"""Settings of sampling and of classifiers compared: on synthetic images, or by one noised count of private ones.

What the settings are chosen by comes from the released samples alone, so the choice costs no privacy; ``noised`` asks
the private images instead, once, as the plan has set aside (``private.choices``). What would train on private images
again is refused. What is measured on real test images beside it is there to look at (figure 4 of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfast.data import ImageSet
from dpfast.data.shards import load_shards
from dpfast.errors import ConfigError
from dpfast.evaluation import accuracy, predict_classes, train_classifier
from dpfast.evaluation.studies import split_synthetic
from dpfast.files import write_atomic, write_json
from dpfast.privacy.choice import noised_choice
from dpfast.privacy.ledger import Ledger
from dpfast.progress import Progress
from dpfast.recipes import fingerprint, flatten, load, parts
from dpfast.recipes.schema import Recipe
from dpfast.report.internal import percent
from dpfast.report.sweep import SweepReport
from dpfast.runs import build, inputs
from dpfast.runs.metrics import Results
from dpfast.runs.pipeline import execute, open_run, preflight
from dpfast.runs.run import Run
from dpfast.runs.terminal import TerminalProgress
from dpfast.runs.work import draw_samples
from dpfast.tables import columns


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """settings: by name, as ``--set`` takes them. synthetic: accuracy of each on held-out samples; real: on the real
    test images. chosen: the best on ``synthetic`` or, where noised_counts are there (of private images), on these.
    """

    settings: tuple[str, ...]
    synthetic: tuple[float, ...]
    real: tuple[float, ...]
    chosen: str
    noised_counts: tuple[float, ...] | None
    page: Path


def variants(recipe: str, settings: Sequence[str], varied: Mapping[str, Sequence[str]]) -> dict[str, Recipe]:
    """The recipe with each combination of the ``varied`` keys' values, by "key=value key=value"."""
    combined = [[f"{key}={value}" for key, value in zip(varied, v, strict=True)] for v in product(*varied.values())]
    return {" ".join(changes): load(recipe, [*settings, *changes]) for changes in combined}


def sweep(
    recipe: Recipe, compared: Mapping[str, Recipe], runs: Path, terminal: TerminalProgress, *, noised: bool = False
) -> Sweep:
    """Draw the recipe's samples where that is not done yet, and compare ``variants`` of it on them.

    One classifier of each variant is trained on eleven twelfths of its samples and reads the last twelfth of the
    recipe's own. A variant of [sample] has samples of its own, drawn from another seed.

    Raises ConfigError, before anything is done, for variants that change what was trained privately, that do not
    differ, or that are not as many as ``private.choices`` where the choice is ``noised``.
    """
    _check(open_run(recipe, runs), compared, noised=noised)
    run = execute(recipe, runs, terminal, until="sample")
    with run.directory.locked():
        scored = _Scored(run, terminal)
        found = [scored(variant) for variant in compared.values()]
        synthetic, real, correct = zip(*found, strict=True)
        names, counts = tuple(compared), None
        best = max(range(len(names)), key=lambda i: synthetic[i])
        if noised:
            counts = _noised(run, [_differing(variant) for variant in compared.values()], torch.tensor(correct))
            best = max(range(len(names)), key=lambda i: counts[i])
        result = Sweep(
            settings=names,
            synthetic=synthetic,
            real=real,
            chosen=names[best],
            noised_counts=counts,
            page=run.directory.sweep_report,
        )
        report = SweepReport(
            name=recipe.name, test_images=len(inputs.test_data(recipe)), held_out=scored.held_out, **_shown(result)
        )
        write_atomic(result.page, report.html())
        write_json(run.directory.sweep, _shown(result))
    return result


def summary(found: Sweep) -> list[str]:
    """What the command prints; figures of real images stand in the page alone."""
    order = sorted(range(len(found.settings)), key=lambda i: -found.synthetic[i])
    rows = [("setting", "held-out synthetic")] + [(found.settings[i], percent(found.synthetic[i])) for i in order]
    by = "synthetic images (no privacy spent)" if found.noised_counts is None else "noised counts (in the ledger)"
    flags = " ".join(f"--set {change}" for change in found.chosen.split(" "))
    return ["", *columns(rows, words=[0]), "", f"Chosen by {by}:  {flags}", f"Must not leave (private):  {found.page}"]


def _shown(result: Sweep) -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name != "page"}


def _check(run: Run, compared: Mapping[str, Recipe], *, noised: bool) -> None:
    planned = run.recipe.private.choices
    if noised and planned != len(compared):
        raise ConfigError(
            f"recipe key private.choices = {planned}: a noised choice among {len(compared)} settings has to be planned"
            f" before the training, whose noise pays for it: --set private.choices={len(compared)}, in a new run"
        )
    seen: dict[tuple[str, ...], str] = {}
    for name, recipe in compared.items():
        preflight(recipe, run.private)
        ours, others = flatten(run.recipe), flatten(recipe)
        changed = [k for k in ours if ours[k] != others[k] and k.partition(".")[0] not in ("sample", "evaluate")]
        if changed:
            raise ConfigError(
                f"{name}: another {', '.join(changed)} means another training, which would spend budget on the private"
                " images for each setting. Compare settings of [sample] and [evaluate]; start other trainings by"
                " dpfast run --name ..."
            )
        same = seen.setdefault(_differing(recipe), name)
        if same != name:
            raise ConfigError(f"{same} and {name}: expected settings that differ in how samples are drawn or read")


def _differing(recipe: Recipe) -> tuple[str, ...]:
    """What of a recipe a setting's figures depend on, besides the run."""
    return repr(recipe.sample), repr(build.classifier_spec(recipe)), repr(build.classifier_seeds(recipe)[0])


class _Scored:
    """Trains a setting's classifier and reads images with it; what was measured before is not measured again."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._own = load_shards(run.directory.samples)
        _, held_out = split_synthetic(self._own)
        self._scored = self._own.select(held_out)
        self._test = inputs.test_data(run.recipe)
        self._results = Results(run.directory.sweep_results)
        self.held_out = len(held_out)

    def __call__(self, recipe: Recipe) -> tuple[float, float, int]:
        """Accuracy on held-out samples and on real test images, and how many private images are read right."""
        key = _key(self._run, recipe)
        if key not in self._results:
            samples = self._samples(recipe)
            train, _ = split_synthetic(samples)
            model = train_classifier(
                samples,
                spec=build.classifier_spec(recipe),
                seed=build.classifier_seeds(recipe)[0],
                subset=train,
                device=recipe.performance.device,
                progress=self._progress,
            )
            self._results[key] = [
                accuracy(model, self._scored),
                accuracy(model, self._test),
                _correct(model, self._run.private),
            ]
        synthetic, real, correct = self._results[key]
        return synthetic, real, correct

    def _samples(self, recipe: Recipe) -> ImageSet:
        drawn = parts(recipe, "sample")
        if drawn == parts(self._run.recipe, "sample"):
            return self._own
        run = self._run
        folder = run.directory.sweep_samples / fingerprint(drawn | run.stages["sample"].parts)
        draw_samples(run, recipe, run.directory.model, folder, self._progress, part="sweep")
        return load_shards(folder)


def _correct(model: torch.nn.Module, images: ImageSet) -> int:
    return int((predict_classes(model, images.images) == images.labels).sum())


def _key(run: Run, recipe: Recipe) -> str:
    return fingerprint(run.stages["sample"].parts | {"setting": _differing(recipe)})


def _noised(run: Run, settings: list[tuple[str, ...]], correct: Tensor) -> tuple[float, ...]:
    """The noised counts, drawn once: the same settings get the same ones ever after."""
    kept = Results(run.directory.choices)
    key = fingerprint(run.stages["sample"].parts | {"settings": settings})
    if key not in kept:
        with Ledger(run.directory.ledger, run.plan) as ledger:
            choice = noised_choice(correct, sigma=run.recipe.private.choice_noise, ledger=ledger)
        kept[key] = list(choice.noised_counts)
    return tuple(kept[key])
