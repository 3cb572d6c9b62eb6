"""Gathers what the reports and ``metrics.json`` say from what the stages left behind."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from dpfast.data.shards import load_shards
from dpfast.files import write_atomic, write_json
from dpfast.recipes import to_toml
from dpfast.report.internal import InternalReport
from dpfast.report.release import ReleaseReport
from dpfast.runs import build
from dpfast.runs.pipeline import Run, run_fingerprint
from dpfast.runs.statements import spent, statement


def write_reports(run: Run) -> None:
    """``release/report.html``, ``internal/report.html`` and ``internal/metrics.json``."""
    seconds = {name: stage.seconds for name, stage in run.stages.items() if name != "report"}
    samples, public_samples = load_shards(run.samples), load_shards(run.public_samples)
    released = ReleaseReport(
        name=run.recipe.name,
        statement=statement(run),
        samples=samples,
        public_samples=public_samples,
        losses=json.loads(run.losses.read_text()),
        epsilon_curve=run.plan.epsilon_curve(points=12) if run.plan.is_private else [],
        recipe=to_toml(run.recipe),
        seconds={name: value for name, value in seconds.items() if name in ("pretrain", "train", "sample")},
    )
    write_atomic(run.directory.release / "report.html", released.html())
    metrics = gather_metrics(run)
    internal = InternalReport(
        name=run.recipe.name,
        metrics=metrics,
        private=run.private,
        samples=samples,
        public_samples=public_samples,
        seconds=seconds,
        recipe=to_toml(run.recipe),
    )
    write_atomic(run.directory.internal / "report.html", internal.html())
    write_json(run.directory.internal / "metrics.json", {**metrics, "seconds": seconds})


def gather_metrics(run: Run) -> dict[str, Any]:
    """Everything of ``metrics.json`` but the times."""
    results = json.loads((run.stages["evaluate"].folder / "results.json").read_text())
    ours, rival = spent(run), spent(run, baseline=True)
    by_seed = {
        name: [results[f"accuracy.{name}.{i}"] for i in range(run.recipe.evaluate.seeds)]
        for name in ("synthetic", "public_only", "real")
    }
    accuracy = {name: fmean(values) for name, values in by_seed.items()}
    accuracy |= {name: results[f"accuracy.{name}"] for name in ("dp_classifier", "public_classifier")}
    return {
        "name": run.recipe.name,
        "fingerprint": run_fingerprint(run),
        "seed": run.recipe.seed,
        "fold": run.recipe.data.fold,
        "epsilon_spent": ours.plan.epsilon(ours.charged_steps),
        "epsilon_baseline": rival.plan.epsilon(rival.charged_steps),
        "epsilon_composed": results["epsilon_composed"],
        "delta": ours.plan.target_delta,
        "noise_multiplier": ours.plan.noise_multiplier,
        "steps": ours.plan.steps,
        "steps_charged": ours.charged_steps,
        "augmult": run.recipe.private.augmult,
        "accuracy": accuracy,
        "accuracy_by_seed": by_seed,
        "classifier_seeds": run.recipe.evaluate.seeds,
        "test_images": len(build.test_data(run.recipe)),
        "frechet": {name: results[f"frechet.{name}"] for name in ("synthetic", "public_only", "extractor")},
    }
