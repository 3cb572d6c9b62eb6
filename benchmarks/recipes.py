"""What the small recipes of published data sets take on this machine, from files as they are published to both reports.

python -m benchmarks.recipes             # on stand-ins, which it writes: a quarter of an hour on two cores
python -m benchmarks.recipes --table     # the table in benchmarks/README.md, from the committed results
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.digits import command

SOURCES = {
    "mnist-small": ("mnist",),
    "cifar10-small": ("cifar10", "imagenet32"),
    "camelyon17-small": ("camelyon17", "imagenet32"),
}
OPTIONS = {"camelyon17": ("--size", "32")}


def measured(recipe: str, folder: Path) -> dict[str, Any]:
    """Minutes of all and seconds by stage; what the stand-ins are worth says nothing."""
    begin = time.monotonic()
    for name in SOURCES[recipe]:
        if not (folder / "data" / name).exists():
            command(folder, "data", "stand-in", name, "--out", f"stand-in/{name}")
            command(
                folder, "data", "prepare", name, "--source", f"stand-in/{name}", "--partial", *OPTIONS.get(name, ())
            )
    command(folder, "run", recipe)
    metrics = json.loads((folder / "runs" / recipe / "internal/metrics.json").read_text())
    kept = {name: metrics[name] for name in ("seconds", "epsilon_spent", "delta", "test_images", "accuracy")}
    return {"recipe": recipe, "minutes": (time.monotonic() - begin) / 60, **kept}


def table(rows: list[dict[str, Any]]) -> str:
    newest = {row["recipe"]: row for row in rows}
    lines = ["| recipe | minutes | epsilon | test images |", "|---|---|---|---|"]
    for name in SOURCES:
        if name in newest:
            row = newest[name]
            lines.append(f"| {name} | {row['minutes']:.1f} | {row['epsilon_spent']:.2f} | {row['test_images']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    if not parser.parse_args().table:
        with tempfile.TemporaryDirectory() as folder:
            for recipe in SOURCES:
                row = measured(recipe, Path(folder))
                print(f"{recipe}: {row['minutes']:.1f} minutes", flush=True)
                results.append("recipes", row)
    text = table(results.rows("recipes"))
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "recipes", text)
    print(text)


if __name__ == "__main__":
    main()
