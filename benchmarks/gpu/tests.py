"""The tests of kernels on a GPU, against float64, a row for each file; then each op under compute-sanitizer."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.jobs import OVER, Job, Missing, Options, Row
from benchmarks.gpu.machine import NO_SANITIZER, not_installed, sanitizer
from benchmarks.results import ROOT

# By what a failure says of the others. With the seconds that they take at most: nearly all of it is compiling.
STEPS = {
    "test_kernels": 240,
    "memcheck": 120,
    "test_kernels_norm": 80,
    "test_kernels_clip": 40,
    "test_affine": 60,
    "test_kernels_embedding": 40,
    "test_kernels_noise": 30,
    "test_kernels_keyed": 30,
    "test_kernels_bounds": 80,
    "racecheck": 120,
}
DRY = {"test_kernels_clip": "triton and several", "memcheck": "", "test_kernels_norm": "triton and nothing"}
WORKERS = 12  # processes that compile kernels side by side
SHOWN = 5  # failures in a row


def jobs(options: Options) -> Iterator[Job]:
    dry = options.dry
    for name in DRY if dry else STEPS:
        seconds = STEPS[name]
        if name.startswith("test_"):
            run = partial(tested, name, DRY[name] if dry else "triton", seconds, options.until)
        else:
            run = partial(sanitized, name, seconds, dry=dry)
        yield Job(name, run, seconds / 2, limit=seconds + 30)


def tested(file: str, selection: str, seconds: float, until: float) -> Row:
    need(*not_installed("pytest", "triton"))
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.reports", "-k", selection]
    workers = min(WORKERS, (os.cpu_count() or 1) - 2)
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        # cuBLAS is deterministic, as the fixture ``poisoned`` has it, with a workspace of its own alone.
        own = {"REPORTS": str(reports), "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | own
        left = until + OVER - 10 - time.time()
        status, output = ended([*command, str(ROOT / f"tests/{file}.py")], env, min(seconds, left))
        return counted(reports.read_text() if reports.exists() else "", status, output)


def need(*missing: str) -> None:
    if missing:
        raise Missing("; ".join(missing))


def ended(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | None, list[str]]:
    """Its exit status (None: stopped because it took too long), and its output by lines."""
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None, []
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def counted(reports: str, status: int | None, output: list[str]) -> Row:
    rows = [json.loads(text) for text in reports.splitlines() if text.endswith("}")]
    first = {row["test"]: row for row in reversed(rows)}  # xdist, too, reports the test with which a worker ended
    outcomes = {
        what: [row for row in first.values() if row["outcome"] == what] for what in ("passed", "failed", "skipped")
    }
    if not rows or status not in (None, 0, 1):
        return {"failed": f"pytest ended with status {status}: {' '.join(output[-1:])[:200]}"}
    numbers = {what: len(found) for what, found in outcomes.items()}
    failures = {row["test"]: row.get("message", "") for row in outcomes["failed"][:SHOWN]}
    said = [f"{number} {what}" for what, number in numbers.items() if number or what == "passed"]
    said += ["stopped before the others"] if status is None else []
    return {
        "tests": numbers,
        "stopped": status is None,
        "failures": failures,
        "line": ", ".join(said) + "".join(f"\n    {test}: {message}" for test, message in failures.items()),
    }


def sanitized(tool: str, seconds: float, *, dry: bool) -> Row:
    """Each op once; its memory comes from the driver, not from a cache, so that reading beside it is seen."""
    program = sanitizer()
    need(*not_installed("triton"), *([] if program or dry else [NO_SANITIZER]))
    under = [] if dry else [str(program), "--tool", tool, "--error-exitcode", "9"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = ended([*under, sys.executable, "-m", "benchmarks.gpu.each_op"], env, seconds)
    if status is None:
        return {"failed": f"took more than {seconds} s"}
    errors = [text for text in output if text.startswith("=========") or "Error" in text]
    if status:
        return {
            "failed": f"status {status}: {' '.join((errors or output)[:4])[:300]}",
            "output": (errors or output)[:60],
        }
    ops = sum(" once, " in text for text in output)
    said = f"{ops} calls of ops{' (on the CPU, without it)' * dry}"
    return {"ops": ops, "line": "; ".join([said, *errors[-1:]])}
