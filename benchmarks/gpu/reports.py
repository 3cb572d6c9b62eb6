"""A pytest plugin (``-p benchmarks.gpu.reports``): what became of each test, as it ends, into the file ``REPORTS``."""

import json
import os

import pytest

from benchmarks.gpu.jobs import is_dead


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A worker of xdist speaks only when its GPU is broken, and ends: xdist goes on with a new one."""
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    is_last = in_worker and report.failed and is_dead()
    if (is_last or not in_worker) and (report.when == "call" or not report.passed):
        write(report)
    if is_last:
        os._exit(1)


def write(report: pytest.TestReport) -> None:
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        lines = report.longreprtext.splitlines() or [""]
        row["message"] = next((text[2:] for text in lines if text.startswith("E ")), lines[0])[:200].strip()
    with open(os.environ["REPORTS"], "a") as file:
        file.write(json.dumps(row) + "\n")
