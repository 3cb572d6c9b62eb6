"""First the gate, then the clock."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels import affine, clip, conv, embedding, linear, noise, norm
from benchmarks.kernels.case import Case, gate
from benchmarks.kernels.speed import timed

CASES = [case for op in (conv, linear, embedding, norm, affine, clip, noise) for case in op.cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_op(
    case: Case, benchmark: BenchmarkFixture, record: Callable[[dict[str, Any]], None], pytestconfig: pytest.Config
) -> None:
    """pytest-benchmark times the op alone, to be compared between commits; ratios come from interleaved rounds."""
    passed, rounds = gate(case), pytestconfig.option.rounds
    if benchmark.enabled:
        row = timed(case, passed, rounds)
        record(row)
        benchmark.extra_info.update(row)
    benchmark.group = case.op
    benchmark.pedantic(case.ours, args=case.arguments(), rounds=rounds, warmup_rounds=1)
