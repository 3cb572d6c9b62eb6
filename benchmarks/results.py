"""Results as data: one JSON line per measurement, with where it was made; tables between markers in the README."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def append(name: str, row: dict[str, Any]) -> None:
    """Add ``row`` to ``results/<name>.jsonl``, with versions, processor and commit."""
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.jsonl", "a") as file:
        file.write(json.dumps({**row, **provenance()}) + "\n")


def rows(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def provenance() -> dict[str, Any]:
    """What a figure depends on besides its settings."""
    packages = ("dpfast", "torch", "diffusers", "dp-accounting", "opacus")
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!*.md")  # they hold the tables
    return {
        "versions": {name: found for name in packages if (found := installed(name))}
        | {"python": platform.python_version()},
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    }


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The features that decide which kernels run; the model's name is often hidden by a hypervisor."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([platform.machine(), *known])


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_between_markers(file: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name: begin`` and ``<!-- name: end``."""
    head, _, rest = file.read_text().partition(f"<!-- {name}: begin")
    marker, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(f"<!-- {name}: end")
    file.write_text(f"{head}<!-- {name}: begin{marker}\n{text}\n<!-- {name}: end{tail}")
