"""Settings compared: of classifiers on released samples alone, which costs no privacy, or by one noised count each.

``noised`` asks the private images, once, at the cost that the plan has set aside (``private.choices``). Only then
settings of sampling can be compared as well: their own samples would vouch for any of them. What would train on private
images again is refused. What is measured on real test images beside it is there to look at (figure 4 of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from dpfast.data.shards import load_shards
from dpfast.errors import BudgetExhausted, ConfigError
from dpfast.evaluation.intervals import differ
from dpfast.evaluation.studies import HELD_OUT, Scorer
from dpfast.files import remove, write_atomic, write_json
from dpfast.privacy.choice import noised_choice
from dpfast.privacy.ledger import Ledger, read_ledger
from dpfast.recipes import fingerprint, flatten, load
from dpfast.recipes.schema import Recipe
from dpfast.report.internal import percent
from dpfast.report.sweep import SweepReport
from dpfast.runs import build, inputs
from dpfast.runs.metrics import Results
from dpfast.runs.pipeline import advance, open_run, sample_parts
from dpfast.runs.run import Run
from dpfast.runs.terminal import TerminalProgress
from dpfast.runs.work import draw_samples
from dpfast.tables import columns

_SPENT = "restore it from a copy: what it held was drawn once, and cannot be drawn again"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """settings: by name, as ``--set`` takes them. synthetic: accuracy of each on held-out samples of its own; real: on
    the real test images. held_out: samples that are held out. chosen: the best on ``synthetic`` or, where noised_counts
    are there (of private images), on these.
    """

    settings: tuple[str, ...]
    synthetic: tuple[float, ...]
    real: tuple[float, ...]
    chosen: str
    noised_counts: tuple[float, ...] | None
    held_out: int
    page: Path


def variants(recipe: str, settings: Sequence[str], varied: Mapping[str, Sequence[str]]) -> dict[str, Recipe]:
    """The recipe with each combination of the ``varied`` keys' values, by "key=value key=value"."""
    combined = [[f"{key}={value}" for key, value in zip(varied, v, strict=True)] for v in product(*varied.values())]
    return {" ".join(changes): load(recipe, [*settings, *changes]) for changes in combined}


def sweep(
    recipe: Recipe, compared: Mapping[str, Recipe], runs: Path, terminal: TerminalProgress, *, noised: bool = False
) -> Sweep:
    """Draw the recipe's samples where that is not done yet, and compare ``variants`` of it.

    One classifier of each variant is trained on eleven twelfths of its samples and reads the last twelfth, the test
    images and, if ``noised``, the private ones.

    Raises ConfigError, before anything is done, for variants that cannot be compared (``_check``), BudgetExhausted for
    a noised choice when another one was drawn.
    """
    run = open_run(recipe, runs)
    _check(run, compared, noised=noised)
    with run.directory.locked():
        run = advance(recipe, runs, terminal, until="sample")
        terminal.stage("sweep")
        asks = noised and _choice(run, compared) not in _kept(run)
        scored = [_scored(run, variant, terminal, noised=asks) for variant in compared.values()]
        if asks:
            _draw(run, compared, [scores["private"] for scores in scored])
        counts = _kept_counts(run, compared) if noised else None
        if noised:
            remove(run.directory.unprotected)  # the true ones, which nobody needs any more
        terminal.close()
        names, synthetic = tuple(compared), tuple(scores["synthetic"] for scores in scored)
        by = synthetic if counts is None else counts
        result = Sweep(
            settings=names,
            synthetic=synthetic,
            real=tuple(scores["real"] for scores in scored),
            chosen=names[max(range(len(names)), key=lambda i: by[i])],
            noised_counts=counts,
            held_out=round(run.recipe.sample.count * HELD_OUT),
            page=run.directory.sweep_report,
        )
        shown = {name: value for name, value in vars(result).items() if name != "page"}
        report = SweepReport(name=recipe.name, test_images=len(inputs.test_data(recipe)), **shown)
        write_atomic(result.page, report.html())
        write_json(run.directory.sweep, shown)
    return result


def summary(found: Sweep) -> list[str]:
    """What the command prints; figures of real images stand in the page alone."""
    by = found.synthetic if found.noised_counts is None else found.noised_counts
    order = sorted(range(len(found.settings)), key=lambda i: -by[i])
    head = ("setting", "held-out synthetic", *([] if found.noised_counts is None else ["noised count"]))
    counts = [] if found.noised_counts is None else [f"{count:,.0f}" for count in found.noised_counts]
    rows = [head] + [(found.settings[i], percent(found.synthetic[i]), *counts[i : i + 1]) for i in order]
    how = "synthetic images (no privacy spent)" if found.noised_counts is None else "noised counts (in the ledger)"
    flags = " ".join(f"--set {change}" for change in found.chosen.split(" "))
    alike = [] if found.noised_counts is not None else _alike(found)
    chosen = f"Chosen by {how}:  {flags}"
    return ["", *columns(rows, words=[0]), "", chosen, *alike, f"Must not leave (private):  {found.page}"]


def _alike(found: Sweep) -> list[str]:
    """How many settings the held-out samples cannot tell from the chosen one."""
    others = [share for name, share in zip(found.settings, found.synthetic, strict=True) if name != found.chosen]
    same = sum(not differ(max(found.synthetic), share, found.held_out) for share in others)
    return [f"No measurable difference on {found.held_out:,} held-out samples to {same} of the others."] if same else []


def _check(run: Run, compared: Mapping[str, Recipe], *, noised: bool) -> None:
    """Refuse fewer than two settings, what is none of [sample] or [evaluate], settings of [sample] without noise, equal
    settings, sets of samples of which no twelfth can be held out, and a noised choice that is not planned or spent.
    """
    if len(compared) < 2:
        raise ConfigError(f"a sweep compares two settings or more, got {', '.join(compared) or 'none'}")
    free = ("evaluate", "sample") if noised else ("evaluate",)
    seen: dict[str, str] = {}
    for name, recipe in compared.items():
        ours, others = flatten(run.recipe), flatten(recipe)
        changed = [key for key in ours if ours[key] != others[key] and key.partition(".")[0] not in free]
        if changed:
            sampling = all(key.startswith("sample.") for key in changed)
            raise ConfigError(f"{name}: {', '.join(changed)} cannot be compared. {_SAMPLED if sampling else _TRAINED}")
        if round(recipe.sample.count * HELD_OUT) < run.private.num_classes:
            raise ConfigError(
                f"{name}: of sample.count = {recipe.sample.count} images a twelfth is held out, which must be at least"
                f" one of each of the {run.private.num_classes} classes: sample more"
            )
        build.sampling(recipe)
        same = seen.setdefault(_setting(recipe), name)
        if same != name:
            raise ConfigError(f"{same} and {name}: expected settings that differ in how samples are drawn or read")
    if noised:
        _check_budget(run, compared)


_SAMPLED = "Samples of a setting vouch for that setting: judge [sample] by noised counts of private images (--noised)"
_TRAINED = (
    "A sweep compares settings of [evaluate] and, with --noised, of [sample]; another training on the private images"
    " spends a budget of its own: start it by dpfast run --name ..."
)


def _check_budget(run: Run, compared: Mapping[str, Recipe]) -> None:
    planned, ledger = run.recipe.private.choices, run.directory.ledger
    if not run.plan.is_private:
        raise ConfigError(
            f"recipe key target_epsilon = {run.recipe.private.target_epsilon}: a run without noise has none"
        )
    if planned != len(compared):
        raise ConfigError(
            f"recipe key private.choices = {planned}: a noised choice among {len(compared)} settings has to be planned"
            f" before the training, whose noise pays for it: --set private.choices={len(compared)}, in a new run"
        )
    if ledger.exists() and read_ledger(ledger).draws and _choice(run, compared) not in _kept(run):
        raise BudgetExhausted(
            f"the noised choice that {ledger} holds is spent, on other settings (or its result was lost): compare"
            " without --noised, or plan a choice in a new run"
        )


def _scored(run: Run, recipe: Recipe, terminal: TerminalProgress, *, noised: bool) -> dict[str, float]:
    """Accuracies by set; what was measured before is not measured again."""
    own = sample_parts(recipe) == sample_parts(run.recipe)
    drawn = fingerprint(run.stages["sample"].parts | sample_parts(recipe))
    folder = run.directory.samples if own else run.directory.sweep_samples / drawn
    if not own:
        draw_samples(run, recipe, run.directory.model, folder, terminal, part="sweep")
    further = {"real": inputs.test_data(run.recipe)} | ({"private": run.private} if noised else {})
    kept = (run.directory.unprotected if noised else run.directory.sweep_results) / f"{drawn}.json"
    scorer = Scorer(
        load_shards(folder),
        seed=build.classifier_seeds(recipe)[0],
        results=Results(kept),
        device=recipe.performance.device,
        progress=terminal,
    )
    return scorer(build.classifier_spec(recipe), **further)


def _setting(recipe: Recipe) -> str:
    """What tells it from others of the same run."""
    classifier = asdict(build.classifier_spec(recipe)) | {"seed": build.classifier_seeds(recipe)[0]}
    return fingerprint({"sample": sample_parts(recipe), "classifier": classifier})


def _choice(run: Run, compared: Mapping[str, Recipe]) -> str:
    """What tells a choice among these settings, in whatever order, from others."""
    return fingerprint({"settings": sorted(map(_setting, compared.values())), "of": run.stages["sample"].parts})


def _kept(run: Run) -> Results:
    return Results(run.directory.choices, cure=_SPENT)


def _draw(run: Run, compared: Mapping[str, Recipe], accuracies: Sequence[float]) -> None:
    """The noised counts of private images, once and for all."""
    correct = torch.tensor([round(share * len(run.private)) for share in accuracies])
    with Ledger(run.directory.ledger, run.plan) as ledger:
        choice = noised_choice(correct, sigma=run.recipe.private.choice_noise, ledger=ledger)
    settings = map(_setting, compared.values())
    _kept(run)[_choice(run, compared)] = dict(zip(settings, choice.noised_counts, strict=True))


def _kept_counts(run: Run, compared: Mapping[str, Recipe]) -> tuple[float, ...]:
    """The noised counts that were drawn: the same settings have the same ones ever after."""
    counts: dict[str, float] = _kept(run)[_choice(run, compared)]
    return tuple(counts[_setting(recipe)] for recipe in compared.values())
