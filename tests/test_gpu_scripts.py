"""``make gpu`` tried without a GPU: rows of every part come out, and a page; what is missing is skipped and said."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpfast

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The folder ``benchmarks`` is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))


def rehearsal(out: Path, *arguments: str, before: Path | None = None, fails: bool = False) -> str:
    """What it prints; ``before``: a folder whose modules stand in front of others."""
    folders = [*([before] if before else []), Path(dpfast.__file__).parents[1], ROOT]
    own = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))} | own
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--dry", "--out", out]
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows_of(out: Path, part: str) -> dict[str, dict]:
    rows = map(json.loads, (out / f"gpu-{part}.jsonl").read_text().splitlines())
    return {row["name"]: row for row in rows}


def page_of(out: Path) -> str | None:
    from benchmarks.gpu.page import page

    return page(out)


def test_tests_are_counted(tmp_path) -> None:
    rehearsal(tmp_path / "out", "tests", "--only", "test_kernels_norm", fails=not HAS_TRITON)
    row = rows_of(tmp_path / "out", "tests")["test_kernels_norm"]
    if HAS_TRITON:
        assert row["tests"] == {"passed": 2, "failed": 0, "skipped": 0}
        assert "2 passed" in page_of(tmp_path / "out")
    else:
        assert row["skipped"] == "triton is not installed"


def test_this_checkout_comes_before_what_is_installed(tmp_path) -> None:
    """An editable installation's finder stands before the path, in the processes of pytest, too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.util import spec_from_file_location\n"
        "class Editable:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return spec_from_file_location(name, {str(tmp_path / 'other.py')!r}) if name == 'dpfast' else None\n"
        "sys.meta_path.insert(0, Editable)\n"
    )
    (tmp_path / "other.py").write_text("raise SystemExit('another dpfast')")
    here = package(tmp_path)
    code = "import benchmarks.gpu.reports, dpfast.kernels, sys; sys.exit(dpfast.__file__)"
    env = {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, here, ROOT))), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True
    )
    assert done.stderr.strip() == str(here / "dpfast/__init__.py")


def package(folder: Path) -> Path:
    """As tools/gpu_package.py makes it, without the native module."""
    made = folder / "package/dpfast"
    made.mkdir(parents=True)
    for source in [*(ROOT / "dpfast").glob("[!_]*"), *(ROOT / "dpfast").glob("_*.py"), ROOT / "kernels"]:
        (made / source.name).symlink_to(source)
    return made.parent


def test_another_checkout_is_not_measured(monkeypatch) -> None:
    from benchmarks.gpu import source

    monkeypatch.setattr(source, "ROOT", ROOT / "elsewhere")
    assert source.foreign() == (
        f"dpfast comes from {Path(dpfast.__file__).parent}, not from this checkout: uninstall it there, or take another"
        " GPU_PYTHON"
    )


def test_ops_are_gated_and_timed(tmp_path) -> None:
    rehearsal(tmp_path / "out", "kernels", "--only", "l")
    rows = rows_of(tmp_path / "out", "kernels")
    assert rows["ceilings"]["flops"]["bfloat16"] > 0
    timed = [row for row in rows.values() if "op" in row]
    assert {row["op"] for row in timed} == {
        "linear.clipped_sum",
        "clip.sq_norms",
        "conv.sq_norms",
        "noise.noised",
        "norm.group_norm_backward",
    }
    assert all(row["error"] < 1e-2 and row["seconds"]["dpfast"] > 0 for row in timed)
    page = page_of(tmp_path / "out")
    assert page.startswith("A DRY RUN")
    assert "linear.clipped_sum" in page
    assert "conv.sq_norms, bfloat16: " in page


def test_errors_and_ratios_are_said() -> None:
    from benchmarks.gpu import page

    row = {"error": 3.94e-3, "excess": 1.004}
    assert not page.is_beyond(row)
    assert page.is_beyond({"excess": float("nan")})
    assert page.excess(row | {"excess": 1.5}) == "ERROR 3.94e-03, 1.50 times the limit"
    assert page.times(3125.95) == "3,126"


@pytest.mark.parametrize(
    ("printed", "line"), [("", "1 calls of ops"), ("========= no error", "1 calls of ops; ========= no error")]
)
def test_what_the_sanitizer_found_is_said(monkeypatch, printed, line) -> None:
    from benchmarks.gpu import tests

    monkeypatch.setattr(tests, "not_installed", lambda *packages: [])
    monkeypatch.setattr(tests, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(tests, "ended", lambda *given: (0, ["clip.sq_norms once, torch.float32", printed]))
    assert tests.sanitized("memcheck", 1, dry=False)["line"] == line


def test_predictions_are_asked_for_what_cost_knows() -> None:
    from benchmarks.gpu import kernels

    found = {case.op: kernels.predicted(case) for case in kernels.cases(dry=True)}
    assert found["conv.sq_norms"] > 0
    assert found["linear.clipped_sum"] > 0
    assert found["norm.group_norm_backward"] is None


def test_steps_are_gated_and_timed_without_what_is_missing(tmp_path) -> None:
    (tmp_path / "opacus.py").write_text("raise ModuleNotFoundError(\"No module named 'opacus'\")")
    said = rehearsal(tmp_path / "out", "step", "--only", "4 rows, K=1", before=tmp_path)
    missing = "opacus cannot be imported (No module named 'opacus')"
    assert said.count(missing) == 1
    rows = {row["contestant"]: row for row in rows_of(tmp_path / "out", "step").values() if "contestant" in row}
    assert set(rows) == {"dpfast materialise", "vmap"}
    assert all(row["time"] > 0 and row["memory"] > 0 and row["error"] < 2e-5 for row in rows.values())
    page = page_of(tmp_path / "out")
    assert "dpfast materialise" in page
    assert f"skipped: {missing}" in page


def test_a_process_that_dies_ends_one_row(tmp_path, monkeypatch) -> None:
    from benchmarks.gpu import jobs

    def run(options: jobs.Options, progress: Path) -> int:
        """Dies at the second job, and cannot go on after the third."""
        if options.first < 2:
            jobs.note(options, {"number": 1, "name": "b", "limit": 0, "left": ["a"]})
            return -11
        jobs.note(options, {"number": 2, "name": "c", "limit": 0, "left": []})
        return jobs.AGAIN if options.first == 2 else 0

    monkeypatch.setattr(jobs, "run", run)
    jobs.supervise(jobs.Options("step", tmp_path))
    rows = rows_of(tmp_path, "step")
    assert rows["b"]["failed"] == "the process ended with SIGSEGV"
    assert rows["left out"]["left_out"] == ["a"]
    assert set(rows) == {"b", "left out"}


def test_nothing_is_measured_without_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    from benchmarks.gpu import machine

    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "sanitizer", lambda: None)
    why = "torch sees no GPU (DRY=1 tries the programs on the CPU)"
    assert ended(monkeypatch, "all", "--out", str(tmp_path)) == f"nothing was measured: {why}"
    said = capsys.readouterr().out
    assert said.count(f"skipped: {why}") == 3
    assert f"skipped: {machine.NO_SANITIZER}" in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_without_torch(tmp_path, monkeypatch) -> None:
    from benchmarks import results

    monkeypatch.setitem(sys.modules, "torch", None)
    said = ended(monkeypatch, "step", "--dry", "--out", str(tmp_path))
    assert said.startswith("nothing was measured: torch cannot be imported (")
    assert list(tmp_path.iterdir()) == []
    assert results.gpu.__wrapped__() == {}


def test_no_page_of_nothing(tmp_path, monkeypatch) -> None:
    assert (
        ended(monkeypatch, "page", "--out", str(tmp_path / "nowhere")) == f"no results of a GPU in {tmp_path}/nowhere"
    )


def test_no_row_of_that_name(tmp_path) -> None:
    said = rehearsal(tmp_path / "out", "step", "--only", "nosuchrow", fails=True)
    assert said.endswith("no row's name holds 'nosuchrow'\n")


def ended(monkeypatch, *arguments: str) -> object:
    """What a program says in the end, in this process."""
    from benchmarks.gpu import __main__

    monkeypatch.setattr(__main__, "foreign", lambda: None)
    monkeypatch.setattr(__main__, "rehearse", lambda part: None)
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code
