"""Attacks on the digits recipe: lower bounds on epsilon beside the accountant's, over several seeds.

    python -m benchmarks.audits                        # five seeds at epsilon 10 and 1: about an hour
    python -m benchmarks.audits --epsilon 1 --seed 0
    python -m benchmarks.audits --table                # the tables in docs/guarantee.md, from the committed results

Every row is a training of its own with canaries in it (``dpfast audit digits``). The model and the samples of a whole
run are attacked for the first seed; the others have none.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.digits import command, dpfast

EPSILONS = ("10", "1")
SEEDS = (0, 1, 2, 3, 4)
RELEASED = (0,)


def measured(epsilon: str, seed: int) -> dict[str, Any]:
    """What ``dpfast audit`` found. It ends in an error where the claim is refuted: then there is no row."""
    settings = (f"seed={seed}", f"target_epsilon={epsilon}")
    with tempfile.TemporaryDirectory() as folder:
        dpfast(Path(folder), "sample" if seed in RELEASED else "pretrain", *settings)
        begin = time.monotonic()
        flags = [flag for setting in settings for flag in ("--set", setting)]
        command(Path(folder), "audit", "digits", "--runs", folder, "--name", "run", *flags)
        found = json.loads((Path(folder) / "run/internal/audit/audit.json").read_text())
    return {"audit": found, "minutes": (time.monotonic() - begin) / 60}


def run(epsilons: Sequence[str], seeds: Sequence[int]) -> None:
    now = results.provenance()["commit"]  # what was measured before a change says nothing of it
    done = {(row["epsilon"], row["seed"]) for row in results.rows("audits") if row["commit"] == now}
    for seed in seeds:
        for epsilon in epsilons:
            if (epsilon, seed) not in done:
                row = {"epsilon": epsilon, "seed": seed, **measured(epsilon, seed)}
                results.append("audits", row)
                print(f"epsilon {epsilon}, seed {seed}: {row['minutes']:.1f} min", flush=True)


def bounds(rows: list[dict[str, Any]]) -> str:
    """Of each epsilon and seed: what the canaries show of one step and of the training."""
    lines = [
        "| epsilon | seed | one step: at least | accountant | the training: at least | accountant |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (-float(row["epsilon"]), row["seed"])):
        of = row["audit"]["canaries"]
        pairs = [(of[name]["epsilon"], of[f"{name}_epsilon"]) for name in ("step", "training")]
        cells = [f"{figure:.2f}" for pair in pairs for figure in pair]
        lines.append(f"| {row['epsilon']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def members(rows: list[dict[str, Any]]) -> str:
    """Of the runs that were released: how well members are told from others."""
    lines = [
        "| epsilon | attack | AUROC | TPR at 1% FPR | TPR at 0.1% FPR |",
        "|---|---|---|---|---|",
    ]
    names = {"model": "losses of the released model", "samples": "distance to the nearest released sample"}
    for epsilon in EPSILONS:
        for name, shown in names.items():
            found = [row["audit"][name] for row in rows if row["epsilon"] == epsilon and row["audit"][name]]
            if found:
                area = statistics.mean(of["auroc"] for of in found)
                told = [statistics.mean(of["true_positives"][i][0] for of in found) for i in range(2)]
                lines.append(f"| {epsilon} | {shown} | {area:.3f} | {100 * told[0]:.1f}% | {100 * told[1]:.1f}% |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Both, of the newest result of each epsilon and seed."""
    newest = list({(row["epsilon"], row["seed"]): row for row in rows}.values())
    return f"{bounds(newest)}\n\n{members(newest)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", nargs="+", default=EPSILONS, choices=EPSILONS)
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.table:
        run(options.epsilon, options.seed)
    text = table(results.rows("audits"))
    results.write_between_markers(results.ROOT / "docs/guarantee.md", "audits", text)
    print(text)


if __name__ == "__main__":
    main()
