"""Figures 2 to 4 of the paper on digits, where the data are public and nobody's: docs/digits.md.

    python -m benchmarks.figures              # what is missing, a row as soon as it is there: half an hour
    python -m benchmarks.figures --draw       # only the page, from the committed results

Figure 2: Frechet distance by epsilon. Figure 3: accuracy by the number of synthetic images, 1 to 30 times the private
ones. Figure 4: settings of a classifier, scored on synthetic and on real images. One seed of the recipe.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.digits import dpfast

EPSILONS = ("1", "3", "10", "inf")
HEADLINE = "10"
TIMES = (1, 3, 10, 30)  # synthetic images over private ones
COMPARED = 3000  # images that Frechet distances are of: they fall with the number
SEEDS = (0, 1, 2)
GRID = {"widths": [(8, 16), (24, 48)], "steps": [60, 200], "learning_rate": [5e-4, 2e-3, 8e-3]}
DOCS = results.ROOT / "docs"


def measure() -> Iterator[dict[str, Any]]:
    """A row for each figure and epsilon that is not there yet."""
    done = {(row["figure"], row["epsilon"]) for row in results.rows("figures")}
    of_epsilon = {epsilon: (2, 3, 4) if epsilon == HEADLINE else (2,) for epsilon in EPSILONS}
    missing = {epsilon: [n for n in numbers if (n, epsilon) not in done] for epsilon, numbers in of_epsilon.items()}
    if not any(missing.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "public"
        public.mkdir()
        dpfast(public, "pretrain")
        for epsilon, numbers in missing.items():
            if numbers:
                private = Path(folder) / epsilon
                shutil.copytree(public, private)
                count = most() if epsilon == HEADLINE else COMPARED
                dpfast(private, "sample", f"target_epsilon={epsilon}", f"sample.count={count}")
                for number in numbers:
                    yield {"figure": number, "epsilon": epsilon, **MEASURES[number](private / "run")}


def samples_of(run: Path) -> Path:
    return next(run / name / "samples" for name in ("release", "not-private") if (run / name).exists())


def most() -> int:
    return max(TIMES) * private_images() // 10 * 10


def private_images() -> int:
    from dpfast.data import real_digits

    return len(real_digits("train"))


def distances(run: Path) -> dict[str, Any]:
    """Of the private model's samples, and of the public one's, to the private images."""
    from dpfast.data import real_digits
    from dpfast.data.shards import load_shards
    from dpfast.evaluation import train_classifier
    from dpfast.evaluation.extractors import extractor_name
    from dpfast.evaluation.frechet import frechet_distance
    from dpfast.recipes import load
    from dpfast.runs import build, inputs
    from dpfast.runs.seeds import seed_for

    recipe, real = load("digits"), real_digits("train")
    seed, spec = seed_for(recipe, "classifier"), build.public_classifier_spec(recipe)
    extractor = train_classifier(inputs.public_data(recipe), spec=spec, seed=seed)
    found = {}
    for name, folder in (("distance", samples_of(run)), ("public", run / "state/sample/public")):
        images = load_shards(folder)
        found[name] = frechet_distance(extractor, real, images.select(range(COMPARED)))
    return {**found, "images": COMPARED, "extractor": extractor_name(recipe.data.public)}


def by_count(run: Path) -> dict[str, Any]:
    from dpfast.data import real_digits
    from dpfast.data.shards import load_shards
    from dpfast.evaluation import ClassifierSpec
    from dpfast.evaluation.studies import accuracy_by_count

    counts = [times * private_images() // 10 * 10 for times in TIMES]
    test = real_digits("test")
    studied = accuracy_by_count(load_shards(samples_of(run)), test, counts=counts, spec=ClassifierSpec(), seeds=SEEDS)
    points = [{"count": p.count, "accuracies": list(p.accuracies), "ensemble": p.ensemble} for p in studied]
    return {"points": points, "test_images": len(test)}


def ranks(run: Path) -> dict[str, Any]:
    from dpfast.data import real_digits
    from dpfast.data.shards import load_shards
    from dpfast.evaluation import ClassifierSpec
    from dpfast.evaluation.studies import classifier_grid, rank_transfer

    synthetic = load_shards(samples_of(run)).select(range(COMPARED))
    found = rank_transfer(synthetic, real_digits("test"), classifier_grid(ClassifierSpec(), **GRID))
    names = ("settings", "synthetic", "real", "interval")
    return {name: list(getattr(found, name)) for name in names} | {"rho": found.rho}


MEASURES = {2: distances, 3: by_count, 4: ranks}


def draw() -> list[Path]:
    """The pictures, and their numbers between the markers of the page."""
    from dpfast.evaluation.studies import CountAccuracy, RankTransfer
    from dpfast.recipes import load
    from dpfast.report.plots import accuracy_by_count_plot, fid_by_epsilon, rank_transfer_plot

    newest = newest_of(results.rows("figures"))
    metrics = [row["metrics"]["accuracy"] for row in results.rows("digits") if row["epsilon"] == HEADLINE]
    files = {}
    of_epsilon = {epsilon: newest[2, epsilon] for epsilon in EPSILONS if (2, epsilon) in newest}
    if of_epsilon:
        points = [(float(epsilon), row["distance"]) for epsilon, row in of_epsilon.items() if epsilon != "inf"]
        some = next(iter(of_epsilon.values()))
        levels = {"public only": some["public"]}
        levels |= {"no noise": of_epsilon["inf"]["distance"]} if "inf" in of_epsilon else {}
        curves = {"digits recipe": points}
        delta = load("digits").private.target_delta
        files["figure2"] = fid_by_epsilon(curves, levels=levels, delta=delta, extractor=some["extractor"])
    if (3, HEADLINE) in newest:
        row = newest[3, HEADLINE]
        counted = [
            CountAccuracy(
                count=p["count"],
                accuracies=tuple(p["accuracies"]),
                ensemble=p["ensemble"],
                test_images=row["test_images"],
            )
            for p in row["points"]
        ]
        names = {"real data": "real", "DP-SGD classifier": "dp_classifier"}
        levels = {name: sum(m[key] for m in metrics) / len(metrics) for name, key in names.items()}
        files["figure3"] = accuracy_by_count_plot(
            {f"\N{GREEK SMALL LETTER EPSILON} = {HEADLINE}": counted}, levels=levels
        )
    if (4, HEADLINE) in newest:
        row = newest[4, HEADLINE]
        values = {name: tuple(row[name]) for name in ("settings", "synthetic", "real", "interval")}
        files["figure4"] = rank_transfer_plot(RankTransfer(**values, rho=row["rho"]))
    for name, png in files.items():
        (DOCS / f"{name}.png").write_bytes(png)
    results.write_between_markers(DOCS / "digits.md", "figures", table(newest))
    return [DOCS / f"{name}.png" for name in files]


def newest_of(rows: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """By figure and epsilon."""
    return {(row["figure"], row["epsilon"]): row for row in rows}


def table(newest: dict[tuple[int, str], dict[str, Any]]) -> str:
    lines = ["| epsilon | Frechet distance |", "|---|---|"]
    for epsilon in EPSILONS:
        if (2, epsilon) in newest:
            name = "none (clipped only)" if epsilon == "inf" else epsilon
            lines.append(f"| {name} | {newest[2, epsilon]['distance']:.2f} |")
    if (3, HEADLINE) in newest:
        lines += ["", "| synthetic images | accuracy, single | ensemble |", "|---|---|---|"]
        for p in newest[3, HEADLINE]["points"]:
            mean = 100 * sum(p["accuracies"]) / len(p["accuracies"])
            lines.append(f"| {p['count']:,} | {mean:.1f}% | {100 * p['ensemble']:.1f}% |")
    if (4, HEADLINE) in newest:
        row = newest[4, HEADLINE]
        low, high = row["interval"]
        lines += [
            "",
            f"Spearman's rho over {len(row['settings'])} settings: {row['rho']:.2f} ({low:.2f} to {high:.2f}).",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw")
    if not parser.parse_args().draw:
        for row in measure():
            results.append("figures", row)
            print({name: row[name] for name in ("figure", "epsilon")}, flush=True)
    print(*draw(), sep="\n")


if __name__ == "__main__":
    main()
