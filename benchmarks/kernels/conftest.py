"""Options of the suite, and the table at its end."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import results
from benchmarks.kernels.speed import table, write_tables

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpfast")
    group.addoption("--rounds", type=int, default=9, help="interleaved rounds of each op and what it is compared with")
    group.addoption(
        "--record",
        action="store_true",
        help="append to benchmarks/results/kernels.jsonl and write the tables in benchmarks/README.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    """``--benchmark-only`` means the clock, although pyproject.toml switches benchmarks off for the tests."""
    config.option.benchmark_enable |= config.option.benchmark_only
    config.stash[ROWS] = []


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes a row of results."""

    def take(row: dict[str, Any]) -> None:
        pytestconfig.stash[ROWS].append(row)
        if pytestconfig.option.record:
            results.append("kernels", row)

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("interleaved rounds")
        terminalreporter.write_line(table(rows))
    if rows and config.option.record:
        write_tables()
