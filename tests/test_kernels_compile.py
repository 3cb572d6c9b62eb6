"""Every Triton kernel in every launch configuration compiles for GPUs that need not be here, and fits them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 101_376, 90: 101_376}  # bytes that a program may have on every GPU of that architecture and the next
FETCHED = 160_000  # where there are descriptors (``dpfast.kernels.launch``)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("dtype", "least"), [("bf16", 20), ("fp32", 20), ("fp64", 1)])
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability, dtype, least) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script, str(capability), dtype], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= least
    assert [row for row in rows if "failed" in row] == []
    for row in rows:
        assert row["local"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= (FETCHED if "by_descriptors" in row["name"] else SHARED[capability]), row
        assert row["narrow"] == 0 or "noise" not in row["name"], row  # places in billions of numbers
        if capability == 90 and dtype == "bf16" and row["matrix_rows"] >= 64:
            assert row["wgmma"], row
            assert row["bulk"] or "by_descriptors" not in row["name"], row
