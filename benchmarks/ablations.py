"""What each of the paper's tricks brings on digits at epsilon 10: one factor at a time, over several seeds.

    python -m benchmarks.ablations                  # what is missing, a row as soon as it is there: some hours
    python -m benchmarks.ablations --only "K = 4"   # one factor
    python -m benchmarks.ablations --table          # the table in benchmarks/README.md, from the committed results

Everything else is the digits recipe. Accuracy is that of its classifier, trained on the synthetic images alone, on the
360 real test scans (whose settings were chosen before, on folds of the other scans).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.digits import dpfast, spread

DEFAULT = "as the recipe: K = 8, uniform timesteps, pre-trained"
MIXTURE = "[[0.05, 0, 30], [0.9, 30, 600], [0.05, 600, 1000]]"
FACTORS = {
    DEFAULT: (),
    "K = 1": ("private.augmult=1",),
    "K = 4": ("private.augmult=4",),
    "K = 16": ("private.augmult=16",),
    "mixture of timesteps: 5% below 30, 90% to 600, 5% above": (f"private.timesteps={MIXTURE}",),
    "without pre-training": ("pretrain.steps=0",),
}
SEEDS = (0, 1, 2)


def measured(settings: tuple[str, ...], seed: int, public: Path) -> dict[str, Any]:
    """Accuracies of classifiers trained on a run's samples. public: a run that is pre-trained as usual."""
    from dpfast.data.shards import load_shards
    from dpfast.evaluation import accuracy, train_classifier
    from dpfast.recipes import load
    from dpfast.runs import build, inputs
    from dpfast.runs.seeds import seed_for

    begin = time.monotonic()
    settings = (f"seed={seed}", *settings)
    with tempfile.TemporaryDirectory() as folder:
        if "pretrain.steps=0" not in settings:
            shutil.copytree(public, folder, dirs_exist_ok=True)
        dpfast(Path(folder), "sample", *settings)
        synthetic = load_shards(Path(folder) / "run/release/samples")
    recipe = load("digits", settings)
    test, found = inputs.test_data(recipe), []
    for number in range(recipe.evaluate.seeds):
        own = seed_for(recipe, "classifier") + 100 * number
        found.append(accuracy(train_classifier(synthetic, spec=build.classifier_spec(recipe), seed=own), test))
    return {"accuracy": statistics.mean(found), "by_classifier": found, "minutes": (time.monotonic() - begin) / 60}


def run(only: str | None) -> None:
    done = {(row["factor"], row["seed"]) for row in results.rows("ablations")}
    for seed in SEEDS:
        wanted = {name: FACTORS[name] for name in FACTORS if (only or name) in name and (name, seed) not in done}
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as public:
            dpfast(Path(public), "pretrain", f"seed={seed}")
            for name, settings in wanted.items():
                row = {"factor": name, "seed": seed, **measured(settings, seed, Path(public))}
                print(f"{name}, seed {seed}: {100 * row['accuracy']:.1f}% in {row['minutes']:.0f} min", flush=True)
                results.append("ablations", row)


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in % with the range over seeds, and the difference from the recipe's of the same seeds."""
    newest = {(row["factor"], row["seed"]): 100 * row["accuracy"] for row in rows}
    lines = ["| digits at epsilon 10 | seeds | accuracy | difference |", "|---|---|---|---|"]
    for name in FACTORS:
        found = {seed: newest[name, seed] for seed in SEEDS if (name, seed) in newest}
        if not found:
            continue
        moved = [value - newest[DEFAULT, seed] for seed, value in found.items() if (DEFAULT, seed) in newest]
        shown = "" if name == DEFAULT or not moved else difference(moved)
        lines.append(f"| {name} | {len(found)} | {spread(list(found.values()))} | {shown} |")
    return "\n".join(lines)


def difference(moved: list[float]) -> str:
    """Mean and range, with signs; no minus before a zero."""
    mean, low, high = (f"{round(of(moved), 1) + 0.0:+.1f}" for of in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="factors whose name holds this")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        run(options.only)
    text = table(results.rows("ablations"))
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "ablations", text)
    print(text)


if __name__ == "__main__":
    main()
