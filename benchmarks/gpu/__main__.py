"""See the README of benchmarks/: ``python -m benchmarks.gpu tests|kernels|launches|step|page|all``."""

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import results
from benchmarks.gpu.jobs import Job, Options, Row, supervise, work
from benchmarks.gpu.machine import lacking, why_no_gpu
from benchmarks.gpu.page import NOT, page
from benchmarks.gpu.source import foreign, source

PARTS = ("tests", "kernels", "launches", "step")
USUAL = ("tests", "kernels", "step")


def main() -> None:
    given = arguments()
    out = given.out or (Path(tempfile.mkdtemp(prefix="dpfast-dry-")) if given.dry else results.FOLDER)
    if given.dry and out.resolve().is_relative_to(results.FOLDER):
        sys.exit("a dry run keeps nothing in benchmarks/results: give another --out")
    if given.dry:
        rehearse(given.part)
    if given.progress is not None:
        options = Options(given.part, out, given.only, given.dry, given.until, given.first, given.progress)
        work(jobs_of(options), options)
        return
    if given.part != "page" and not given.dry and (reason := foreign()):
        sys.exit(reason)
    print(f"results: {out}; dpfast: {source() or 'not there'}", flush=True)
    parts = USUAL if given.part == "all" else [given.part] if given.part in PARTS else []
    rows = [row for part in parts for row in run(Options(part, out, given.only, given.dry, ending(given.minutes)))]
    text = page(out) if given.part in ("all", "page") else None
    if text is not None:
        (out / "gpu.txt").write_text(text + "\n")
        print(text)
    if given.part == "page" and text is None:
        sys.exit(f"no results of a GPU in {out}")
    if parts and (reason := why_nothing(rows, given.only, dry=given.dry)):
        sys.exit(reason)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "page", "all"], help="all: tests, kernels, step and page")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, into a temporary folder")
    parser.add_argument("--out", type=Path, help="folder of results; benchmarks/results by default")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which a part begins nothing more")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def rehearse(part: str) -> None:
    """Ops by Triton's interpreter; steps as on any CPU."""
    if part in ("tests", "kernels", "launches"):
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def ending(minutes: float) -> float:
    """The time at which a part that begins now begins nothing more."""
    return time.time() + 60 * minutes


def run(options: Options) -> list[Row]:
    """Its rows; without a GPU none, and a line for everything that is missing."""
    print(f"== {options.part}", flush=True)
    if reason := why_no_gpu(dry=options.dry):
        for missing in (reason, *lacking(options.part)):
            print(f"skipped: {missing}", flush=True)
        return []
    supervise(options)
    return [row for row in results.rows(f"gpu-{options.part}", options.out) if row["run"] == options.until]


def why_nothing(rows: list[Row], only: str, *, dry: bool) -> str | None:
    """Why nothing was measured, if nothing was."""
    if reason := why_no_gpu(dry=dry):
        return f"nothing was measured: {reason}"
    if not rows:
        return f"no row's name holds {only!r}"
    if all(any(what in row for what in NOT) for row in rows):
        return "nothing was measured: every row failed, or was skipped or left out"
    return None


def jobs_of(options: Options) -> Iterator[Job]:
    """Of one part; what another needs may be missing."""
    return importlib.import_module(f"benchmarks.gpu.{options.part}").jobs(options)


if __name__ == "__main__":
    main()
