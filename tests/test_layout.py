"""Who imports whom: in one direction, as CONTRIBUTING says."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the top down; whatever is not named here stands on its own feet below all of these.
ORDER = (
    "__main__",
    "cli",
    "data_cli",
    "runs",
    "report",
    "recipes",
    "audit",
    "evaluation",
    "diffusion",
    "trainer",
    "callbacks",
    "diagnostics",
    "engine",
    "probe",
    "bench",
    "optimizer",
    "testing",
    "ranks",
    "data",
    "privacy",
    "clipping",
)


def imports(path: Path) -> set[str]:
    """Names below ``dpfast.`` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dpfast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dpfast."):
            found.add(node.module.removeprefix("dpfast."))
    return found


def files() -> list[Path]:
    return [path for path in (ROOT / "dpfast").rglob("*.py") if path.name != "__init__.py"]


def test_modules_import_in_one_direction():
    graph = {".".join(path.relative_to(ROOT / "dpfast").with_suffix("").parts): imports(path) for path in files()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_packages_import_downward():
    wrong = []
    for path in files():
        package = path.relative_to(ROOT / "dpfast").parts[0].removesuffix(".py")
        above = ORDER[: ORDER.index(package)] if package in ORDER else ORDER
        wrong += [f"{package} imports {name}" for name in imports(path) if name.split(".")[0] in above]
    assert wrong == []


def test_clipping_and_privacy_do_not_know_each_other():
    for package, other in (("clipping", "privacy"), ("privacy", "clipping")):
        for path in (ROOT / "dpfast" / package).rglob("*.py"):
            assert [name for name in imports(path) if name.split(".")[0] == other] == []


def test_every_op_has_its_reference():
    ops = [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert [op.name for op in ops if not {"__init__.py", "reference.py"} <= {file.name for file in op.iterdir()}] == []
    natives = {path.parent.name for path in (ROOT / "kernels").rglob("native.py")}
    natives.remove("linear")  # a convolution with one tap
    assert natives <= {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
