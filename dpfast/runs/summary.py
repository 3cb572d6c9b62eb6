"""The last lines that a command prints."""

from __future__ import annotations

from dpfast.privacy.statement import SHOWN
from dpfast.report.internal import ROWS, UNPROTECTED, indistinguishable, percent, rows_of
from dpfast.report.release import shown_epsilon
from dpfast.runs.metrics import read_metrics
from dpfast.runs.run import Run
from dpfast.runs.spent import spent


def summary(run: Run, until: str) -> list[str]:
    """After a whole run the accuracies, epsilon and where the reports lie; else where the results lie."""
    return _whole(run) if until == "report" else [f"{until}: {run.stages[until].outputs[0]}"]


def _whole(run: Run) -> list[str]:
    """Without what private images are worth to a classifier without protection: that stays in the internal report."""
    metrics, at = read_metrics(run), run.directory
    printed = metrics | {"accuracy": {k: v for k, v in metrics["accuracy"].items() if k != UNPROTECTED}}
    lines = ["", f"Accuracy on {metrics['test_images']} real test images of a classifier trained on"]
    width = max(len(row.name) for row in ROWS)
    lines += [f"  {row.name:<{width}} {percent(printed['accuracy'][row.key]):>7}" for row in rows_of(printed)]
    unprotected = next(row for row in ROWS if row.key == UNPROTECTED)
    lines += [f"  {unprotected.name:<{width}}   see the internal report"]
    alike = indistinguishable(printed)
    lines += [alike] if alike else []
    shown = ["", SHOWN] if spent(run).unsafe_debug else []
    if not run.plan.is_private:
        warning = "NOT PRIVATE: no noise was added; release nothing"
        return [*lines, *shown, "", warning, str(at.release_report), str(at.internal_report)]
    epsilon = shown_epsilon(float(metrics["epsilon_spent"]))
    return [
        *lines,
        *shown,
        "",
        f"Privacy: epsilon {epsilon} at delta {metrics['delta']:g}, for one image",
        f"May be released:     {at.release_report}",
        f"Must not (private):  {at.internal_report}",
    ]
