"""What was measured: results as they come, and ``metrics.json``, which gathers them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from dpfast.errors import FileError
from dpfast.files import read_json, write_json
from dpfast.runs import inputs
from dpfast.runs.run import Run
from dpfast.runs.spent import spent

_CURE = "delete it and run the same command again: only the evaluation is repeated"


class Results:
    """Named results in a JSON file that is rewritten with each new one. cure: what helps when it is damaged.

    Raises:
        FileError: the file is damaged, or lacks what is asked of it.
    """

    def __init__(self, path: Path, *, cure: str = _CURE) -> None:
        self._path, self._cure = path, cure
        self._values: dict[str, Any] = {}
        if path.exists():
            values = read_json(path, cure=cure)
            if not isinstance(values, dict):
                raise FileError(f"{path} is damaged: expected named results, got {values!r}; {cure}")
            self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise FileError(f"{self._path} lacks {key!r}; {self._cure}")
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        write_json(self._path, self._values)


def gather_metrics(run: Run) -> dict[str, Any]:
    """Everything of ``metrics.json`` but the times."""
    results = Results(run.directory.results)
    ours, rival = spent(run), spent(run, baseline=True)
    by_count = results["accuracy_by_count"]
    by_seed = {"synthetic": by_count[-1]["accuracies"]} | {
        name: [results[f"accuracy.{name}.{i}"] for i in range(run.recipe.evaluate.seeds)]
        for name in ("public_only", "real")
    }
    scores = {name: results[f"scores.{name}"] for name in ("synthetic", "public_only")}
    accuracy = {name: fmean(values) for name, values in by_seed.items()}
    accuracy["dp_classifier"] = results["accuracy.dp_classifier"]
    if inputs.shares_labels(run.recipe):
        accuracy["public_classifier"] = results["accuracy.public_classifier"]
    return {
        "name": run.recipe.name,
        "fingerprint": run.fingerprint,
        "seed": run.recipe.seed,
        "fold": run.recipe.data.fold,
        "target_epsilon": run.recipe.private.target_epsilon,
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
        "test_images": len(inputs.test_data(run.recipe)),
        "private_images": run.stages["train"].parts["private images"],
        "accuracy_by_count": by_count,
        "scores": scores,
        "frechet": {name: of["fid"] for name, of in scores.items()} | {"extractor": scores["synthetic"]["extractor"]},
    }


def read_metrics(run: Run) -> dict[str, Any]:
    """What ``metrics.json`` says."""
    metrics: dict[str, Any] = read_json(
        run.directory.metrics, cure="run the same command again, it is written anew every time"
    )
    return metrics
