"""A recipe's private training attacked, and what its run has made so far: to be kept inside."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from dpfast.audit.canaries import CanaryAudit, Finding, Observed, audit, observe
from dpfast.audit.members import Copies, Membership, copies, loss_scores, membership, nearest
from dpfast.data import Augment, ImageSet
from dpfast.data.shards import load_shards
from dpfast.diffusion.loading import load_unet
from dpfast.errors import ConfigError
from dpfast.files import write_atomic, write_json
from dpfast.report.audit import AuditReport
from dpfast.runs import build, inputs
from dpfast.runs.run import Run
from dpfast.runs.terminal import TerminalProgress

_MOST_SCORED = 5000  # images of each kind whose losses are read, and samples that are compared


@dataclass(frozen=True, kw_only=True)
class RunAudit:
    """What each attack found; None where the run has no model, or no samples, yet."""

    canaries: CanaryAudit
    model: Membership | None
    samples: Membership | None
    copies: Copies | None

    @property
    def refuted(self) -> list[Finding]:
        """Findings that a sound training does not give."""
        return [finding for finding in self.canaries.findings if not finding.sound]


def audit_run(run: Run, terminal: TerminalProgress, *, canaries: int = 1000, background: int = 200) -> RunAudit:
    """Train as the recipe does, on canaries and some private images, then attack what the run has made.

    Writes ``internal/audit/``, and spends no budget, because nothing of it may leave. Raises ConfigError for a recipe
    without noise.
    """
    at, recipe = run.directory, run.recipe
    if not run.plan.is_private:
        raise ConfigError(
            f"recipe key target_epsilon = {recipe.private.target_epsilon}: without noise nothing is promised"
        )
    at.mark()
    terminal.say("audit: training with canaries ...")
    terminal.stage("audit")
    found = audit(_observe(run, terminal, canaries, background))
    trained, drawn = run.stages["train"].done(), run.stages["sample"].done()
    members, others = _some(run.private), _some(inputs.test_data(recipe))
    samples = _some(load_shards(at.samples)) if drawn else None
    if trained:
        terminal.say("audit: membership ...")
        terminal.stage("audit")
    result = RunAudit(
        canaries=found,
        model=_by_loss(run, members, others, terminal) if trained else None,
        samples=None if samples is None else _by_distance(samples, members, others),
        copies=None if samples is None else copies(samples, run.private, others),
    )
    terminal.close()
    report = AuditReport(
        name=recipe.name, **vars(result), released=samples, private=run.private if samples is not None else None
    )
    write_atomic(at.audit_report, report.html())
    write_json(at.audit, asdict(result))
    return result


def summary(result: RunAudit, run: Run) -> list[str]:
    """What the command prints."""
    of = result.canaries
    lines = [
        "",
        f"One step:      epsilon is at least {of.step.epsilon:.2f}; the accountant says {of.step_epsilon:.2f}",
        f"The training:  epsilon is at least {of.training.epsilon:.2f}; the accountant says {of.training_epsilon:.2f}",
    ]
    refuted = result.refuted
    lines += [f"REFUTED: {finding.name}: {finding.seen:.4g}, expected {finding.limits}" for finding in refuted]
    lines += [] if refuted else ["Nothing refutes the claim. An audit cannot prove it."]
    return [*lines, f"Must not leave (private):  {run.directory.audit_report}"]


def _observe(run: Run, terminal: TerminalProgress, canaries: int, background: int) -> Observed:
    recipe, at = run.recipe, run.directory
    public = run.stages["pretrain"].done()
    model = load_unet(at.public_model) if public else build.unet(recipe, run.private)
    return observe(
        build.tuned(recipe, model).train(),
        run.private,
        run.plan,
        objective=build.private_objective(recipe, run.private),
        canaries=canaries,
        background=background,
        seed=recipe.seed,
        progress=terminal,
        **build.training_options(recipe, recipe.private),
    )


def _by_loss(run: Run, members: ImageSet, others: ImageSet, terminal: TerminalProgress) -> Membership:
    objective = replace(build.private_objective(run.recipe, run.private), augment=Augment(), label_drop=0.0)
    model = load_unet(run.directory.model).to(run.recipe.performance.device)
    inside, outside = (loss_scores(model, objective, images, progress=terminal) for images in (members, others))
    return membership(inside, outside)


def _by_distance(samples: ImageSet, members: ImageSet, others: ImageSet) -> Membership:
    inside, outside = (-nearest(images.images, samples.images)[0] for images in (members, others))
    return membership(inside, outside)


def _some(images: ImageSet) -> ImageSet:
    """At most as many as are scored, the same ones every time."""
    if len(images) <= _MOST_SCORED:
        return images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_MOST_SCORED]
    return images.select(chosen.sort().values)
