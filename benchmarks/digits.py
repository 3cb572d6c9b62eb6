"""What the digits recipe is worth at several epsilon, over several seeds.

    python -m benchmarks.digits                          # three seeds at epsilon 10, 1 and without noise: about an hour
    python -m benchmarks.digits --epsilon 1 --seed 0
    python -m benchmarks.digits --table                  # the table in the README, from the committed results

A seed changes initial weights, fonts, augmentations and samples; noise and batches are new in every run anyway.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results

EPSILONS = ("10", "1", "inf")
SHOWN = ("synthetic", "public_only", "dp_classifier", "real")


def command(folder: Path, *words: str) -> None:
    """``dpfast WORDS`` in ``folder``."""
    subprocess.run([sys.executable, "-m", "dpfast.cli", *words], check=True, cwd=folder)


def dpfast(folder: Path, word: str, *settings: str) -> None:
    """``dpfast WORD digits`` in ``folder``."""
    flags = [flag for setting in settings for flag in ("--set", setting)]
    command(folder, word, "digits", "--runs", str(folder), "--name", "run", *flags)


def measure(epsilons: Sequence[str], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each epsilon with the metrics of a run of its own; the public pre-training is done once."""
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "public"
        public.mkdir()
        dpfast(public, "pretrain", f"seed={seed}")
        for epsilon in epsilons:
            private = Path(folder) / epsilon
            shutil.copytree(public, private)  # no ledger is in it yet
            dpfast(private, "run", f"seed={seed}", f"target_epsilon={epsilon}")
            yield epsilon, json.loads((private / "run/internal/metrics.json").read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy in % with the range over seeds, newest run of each seed."""
    lines = [
        "| epsilon | seeds | synthetic only | public only | DP-SGD classifier | real data | Frechet | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for epsilon in EPSILONS:
        runs = list({row["seed"]: row["metrics"] for row in rows if row["epsilon"] == epsilon}.values())
        if not runs:
            continue
        cells = [spread([100 * run["accuracy"][name] for run in runs]) for name in SHOWN]
        frechet = statistics.mean(run["frechet"]["synthetic"] for run in runs)
        minutes = statistics.median(sum(run["seconds"].values()) for run in runs) / 60  # machines are shared
        name = "none (clipped only)" if epsilon == "inf" else epsilon
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {frechet:.1f} | {minutes:.1f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", nargs="+", default=EPSILONS, choices=EPSILONS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only write the table into the README")
    options = parser.parse_args()
    if not options.table:
        for seed in options.seed:
            for epsilon, metrics in measure(options.epsilon, seed):
                results.append("digits", {"epsilon": epsilon, "seed": seed, "metrics": metrics})
    text = table(results.rows("digits"))
    results.write_between_markers(results.ROOT / "README.md", "digits", text)
    print(text)


if __name__ == "__main__":
    main()
