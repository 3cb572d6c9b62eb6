"""A pytest plugin (``-p benchmarks.gpu.reports``): what became of each test, as it ends, into the file ``REPORTS``."""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.outcome == "passed"):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        lines = [text for text in report.longreprtext.splitlines() if text.startswith("E ")]
        row["message"] = " ".join(lines[:1])[2:200].strip()
    with open(os.environ["REPORTS"], "a") as file:
        file.write(json.dumps(row) + "\n")
