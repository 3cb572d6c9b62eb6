"""For those who hold the private images: several runs side by side, and their FID by epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from dpfast.errors import ConfigError
from dpfast.files import read_json, write_atomic
from dpfast.recipes import flatten, load
from dpfast.report import page as html
from dpfast.report.internal import WARNING, percent
from dpfast.report.plots import fid_by_epsilon
from dpfast.report.release import shown_epsilon

_COMPARABLE = ("sha256", "settings", "synthetic_images")  # of scores, or they tell different things


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """metrics: what ``metrics.json`` says, by the name of the run. recipes: by key, likewise."""

    metrics: Mapping[str, Mapping[str, Any]]
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def html(self) -> str:
        """The whole page; its first visible line is the warning."""
        lead = (
            "What more privacy costs, and what other settings are worth. One run each: another one gives other figures."
        )
        body = [
            html.header("Internal report", "Runs compared", lead),
            self._table(),
            self._by_epsilon(),
            self._settings(),
        ]
        return html.page("Runs compared", body, banner=WARNING)

    def _table(self) -> str:
        head = ("run", "ε", "synthetic only", "DP-SGD classifier", "real data", "FID", "1000 KID", "samples")
        rows = [
            (
                escape(name),
                shown_epsilon(float(of["epsilon_spent"])),
                *(percent(of["accuracy"][key]) for key in ("synthetic", "dp_classifier", "real")),
                f"{of['scores']['synthetic']['fid']:.2f}",
                f"{1000 * of['scores']['synthetic']['kid']:.2f}",
                f"{of['scores']['synthetic']['synthetic_images']:,}",
            )
            for name, of in self._sorted()
        ]
        return html.section(
            "Accuracy on real test images, and distance to real images",
            html.table(head, rows, numbers=range(1, len(head))),
        )

    def _by_epsilon(self) -> str:
        scores = [of["scores"]["synthetic"] for _, of in self._sorted()]
        deltas, private = ({of[key] for of in self.metrics.values()} for key in ("delta", "private_images"))
        if len(private) > 1 or any(
            [score[key] for key in _COMPARABLE] != [scores[0][key] for key in _COMPARABLE] for score in scores
        ):
            return html.paragraph(
                "The distances are to other images, or of other extractors, settings or numbers: they cannot be"
                " compared, and no curve is drawn.",
                note=True,
            )
        points = [(float(of["target_epsilon"]), of["scores"]["synthetic"]["fid"]) for _, of in self._sorted()]
        finite = [(epsilon, fid) for epsilon, fid in points if math.isfinite(epsilon)]
        if len(finite) < 2 or len(points) > len({epsilon for epsilon, _ in points}) or len(deltas) > 1:
            return ""
        levels = {"public only": self._sorted()[0][1]["scores"]["public_only"]["fid"]}
        if len(finite) < len(points):
            levels["no noise"] = points[-1][1]
        said = "FID of the released samples by epsilon"
        plot = fid_by_epsilon(
            {"released samples": finite}, levels=levels, delta=deltas.pop(), extractor=scores[0]["extractor"]
        )
        return html.section("FID by epsilon", html.figure(html.image(plot, said), f"{said}, a dot for each run."))

    def _settings(self) -> str:
        """What the recipes differ in."""
        recipes = [self.recipes[name] for name, _ in self._sorted() if name in self.recipes]
        keys = sorted({key for recipe in recipes for key in recipe} - {"name"})
        rows = [(key, *(escape(str(recipe.get(key))) for recipe in recipes)) for key in keys]
        differing = [row for row in rows if len(set(row[1:])) > 1]
        if not differing:
            return ""
        return html.section(
            "What they differ in",
            html.table(("key", *(escape(name) for name, _ in self._sorted() if name in self.recipes)), differing),
        )

    def _sorted(self) -> list[tuple[str, Mapping[str, Any]]]:
        return sorted(self.metrics.items(), key=lambda item: float(item[1]["epsilon_spent"]))


def compare(runs: Sequence[Path], page: Path) -> None:
    """Write the page of these run folders. Raises ConfigError for fewer than two, or one that was not evaluated."""
    if len(set(runs)) < 2:
        raise ConfigError(f"expected two runs or more to compare, got {', '.join(map(str, runs)) or 'none'}")
    metrics, recipes = {}, {}
    for run in runs:
        path = run / "internal" / "metrics.json"
        found = read_json(path, cure=f"{run} is no finished run: dpfast evaluate {run}/recipe.toml --runs {run.parent}")
        if "scores" not in found:
            raise ConfigError(f"{path} is of an older dpfast and lacks scores: dpfast evaluate {run}/recipe.toml")
        metrics[str(run)] = found
        recipes[str(run)] = flatten(load(run / "recipe.toml"))
    write_atomic(page, Comparison(metrics=metrics, recipes=recipes).html())
