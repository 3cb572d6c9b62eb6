"""Benchmarks do not rot, and what they publish is made from their results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The folder ``benchmarks`` is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_an_op_is_measured() -> None:
    case = "conv.sq_norms-16-16-3x3-4-B64-K8-float32"
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels", "--benchmark-only", "--rounds=1", "-k", case]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "| `conv.sq_norms` | 16→16 3x3 @4, B=64 K=8 | fp32 |" in done.stdout


def test_a_wrong_op_is_not_timed() -> None:
    from dataclasses import replace

    from benchmarks.kernels import linear
    from benchmarks.kernels.case import gate

    for case in list(linear.cases())[-5:]:
        gate(case)

        def wrong(*arguments, case=case):
            first, *rest = result if isinstance(result := case.ours(*arguments), tuple) else (result,)
            return 1.001 * first, *rest

        with pytest.raises(AssertionError, match=case.op):
            gate(replace(case, ours=wrong))


@pytest.mark.parametrize(("name", "make"), [("ops", "summary"), ("kernels", "table")])
def test_the_tables_of_ops_are_generated(name, make) -> None:
    from benchmarks import results
    from benchmarks.kernels import speed

    text = (ROOT / "benchmarks/README.md").read_text()
    (written,) = re.findall(rf"<!-- {name}: begin[^\n]*\n(.*?)\n<!-- {name}: end", text, re.DOTALL)
    assert written == getattr(speed, make)(results.rows("kernels"))


@pytest.mark.parametrize(
    ("page", "name", "module"),
    [
        ("docs/digits.md", "figures", "figures"),
        ("benchmarks/README.md", "around", "around"),
        ("benchmarks/README.md", "data", "data"),
        ("benchmarks/README.md", "ablations", "ablations"),
        ("benchmarks/README.md", "recipes", "recipes"),
        ("benchmarks/README.md", "overhead", "overhead"),
        ("benchmarks/README.md", "ranks", "ranks"),
        ("docs/guarantee.md", "audits", "audits"),
        ("docs/guarantee.md", "trust", "trust"),
    ],
)
def test_other_tables_are_generated(page, name, module) -> None:
    from importlib import import_module

    from benchmarks import results

    made, rows = import_module(f"benchmarks.{module}"), results.rows(name)
    (written,) = re.findall(
        rf"<!-- {name}: begin[^\n]*\n(.*?)\n?<!-- {name}: end", (ROOT / page).read_text(), re.DOTALL
    )
    assert written == made.table(made.newest_of(rows) if module == "figures" else rows)


def test_what_is_committed_of_trust_is_what_is_promised() -> None:
    from benchmarks import overhead, ranks, results

    found = {row["name"]: row for row in results.rows("trust")}
    assert found["sensitivity"]["architectures"] >= 20
    assert max(found["sensitivity"]["excess"].values()) <= 1e-5
    assert found["cuts"]["cuts"] >= 200
    assert sum(found["fuzzing"]["inputs"].values()) >= 10_000
    audits = {(row["epsilon"], row["seed"]): row["audit"]["canaries"] for row in results.rows("audits")}
    assert audits.keys() == {(epsilon, seed) for epsilon in ("10", "1") for seed in range(5)}
    for audit in audits.values():
        for part in ("step", "training"):
            assert audit[part]["epsilon"] < audit[f"{part}_epsilon"]
    scaling = ranks.newest(results.rows("ranks"))
    assert all(ranks.share(scaling, kind) >= ranks.LEAST for kind in ranks.KINDS)
    for runs in overhead.newest(results.rows("overhead")).values():
        assert overhead.together(runs) < overhead.MOST
        assert runs[0]["expected_batch_size"] >= 64
        assert runs[0]["augmult"] == 8


@pytest.mark.parametrize("examples", [4, 1])
def test_the_input_of_a_step_is_measured(monkeypatch, examples) -> None:
    from benchmarks import data
    from benchmarks.cases import Row

    monkeypatch.setattr(data, "COUNT", data.CHUNK)
    row = Row("digits", examples, 2)
    steps = data.parts(row)
    assert len(steps["gather and views"]()) == 2 * examples
    first, second = (steps["gather"]()[0] for _ in range(2))
    assert first.shape == second.shape == (examples, 1, 8, 8)
    assert not first.equal(second)
    found = data.measured(row, rounds=1)
    assert found["shares"].keys() == set(data.PARTS)
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_the_input_is_measured_in_the_batches_of_training() -> None:
    from benchmarks import data

    found = {(row.model, row.augmult): row.examples for row in data.ROWS}
    assert [found["unet6m", k] for k in (1, 16, 128)] == [21, 1, 1]
    assert [found["digits", k] for k in (1, 16, 128)] == [1024, 64, 8]


def test_a_share_stands_beside_its_seconds() -> None:
    from benchmarks import data, shares

    row = {"row": "a", "seconds": dict.fromkeys(data.PARTS, 2e-3), "shares": dict.fromkeys(data.PARTS, 0.004)}
    row["seconds"][shares.STEP] = 0.5
    older = row | {"seconds": row["seconds"] | {shares.STEP: 0.1}}
    _, _, line = data.table([older, row]).splitlines()
    assert line == f"| a | 500 |{4 * ' 2.00 ms, 0.4% |'}"


def test_figures_are_drawn(tmp_path) -> None:
    from benchmarks import cases, plots, step

    rows = [
        {"row": row.name, "contestant": name, "tag": cases.SWEEP_TAG, "time": 1.1, "memory": 1.05}
        for row, names in step.sweep().items()
        for name in names[1:]
    ]
    skipped = {"row": rows[0]["row"], "contestant": "vmap", "tag": cases.SWEEP_TAG, "skipped": "wrong"}
    for path in plots.write([*rows, skipped], tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_leaves_out_who_would_store_too_much() -> None:
    from benchmarks import step

    taking_part = {row.name: names for row, names in step.sweep().items()}
    assert taking_part["unet-w32 float32 B=1 K=1"] == list(step.SWEPT)
    assert "Opacus hooks" not in taking_part["unet-w32 float32 B=32 K=16"]
