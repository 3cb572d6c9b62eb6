"""Results as data: one JSON line per measurement, with where it was made; tables between markers in the README."""

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def append(name: str, row: dict[str, Any], folder: Path = FOLDER) -> None:
    """Add ``row`` to ``<folder>/<name>.jsonl``, with versions, processor and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(json.dumps({**row, **provenance()}) + "\n")


def rows(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@functools.cache
def provenance() -> dict[str, Any]:
    """What a figure depends on besides its settings. ``COMMIT`` names the commit of a copy that git does not know."""
    packages = ("dpfast", "torch", "triton", "diffusers", "dp-accounting", "opacus")
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!*.md")  # they hold the tables
    return {
        "versions": {name: found for name in packages if (found := installed(name))}
        | {"python": platform.python_version()},
        "machine": {"processor": processor(), "cores": os.cpu_count(), **gpu()},
        "commit": (git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "")) + ("+" if changed else ""),
    }


@functools.cache
def gpu() -> dict[str, Any]:
    """Its name, compute capability, memory, driver and CUDA; nothing where there is no torch, or it sees none."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    of = torch.cuda.get_device_properties(0)
    found = {"name": of.name, "capability": f"{of.major}.{of.minor}", "processors": of.multi_processor_count}
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {"gpu": found | {"memory": of.total_memory, "cuda": torch.version.cuda, "driver": driver}}


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
    return output_of("git", "-C", str(ROOT), *arguments)


def output_of(*command: str) -> str:
    """What it prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_between_markers(file: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name: begin`` and ``<!-- name: end``."""
    head, _, rest = file.read_text().partition(f"<!-- {name}: begin")
    marker, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(f"<!-- {name}: end")
    file.write_text(f"{head}<!-- {name}: begin{marker}\n{text}\n<!-- {name}: end{tail}")
