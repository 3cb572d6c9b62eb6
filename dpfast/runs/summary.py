"""The last lines that a command prints."""

from __future__ import annotations

import json
from typing import Any

from dpfast.report.internal import ROWS, percent
from dpfast.report.release import shown_epsilon
from dpfast.runs.pipeline import Run


def summary(run: Run, until: str) -> list[str]:
    """After a whole run the accuracies, epsilon and where the reports lie; else where the results lie."""
    if until == "report":
        return _whole(run)
    places = {"pretrain": run.public_model, "train": run.model, "sample": run.samples}
    return [f"{until}: {places[until]}"]


def _whole(run: Run) -> list[str]:
    metrics: dict[str, Any] = json.loads((run.directory.internal / "metrics.json").read_text())
    lines = ["", f"Accuracy on {metrics['test_images']} real test images of a classifier trained on"]
    for key, name, _ in ROWS:
        lines.append(f"  {name:<18} {percent(metrics['accuracy'][key]):>6}")
    epsilon = shown_epsilon(float(metrics["epsilon_spent"]))
    outside, inside = run.directory.release / "report.html", run.directory.internal / "report.html"
    if not run.plan.is_private:
        return [*lines, "", "NOT PRIVATE: no noise was added; release nothing", str(outside), str(inside)]
    return [
        *lines,
        "",
        f"Privacy: epsilon {epsilon} at delta {metrics['delta']:g}, for one image",
        f"May be released:     {outside}",
        f"Must not (private):  {inside}",
    ]
