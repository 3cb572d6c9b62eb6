"""dpfast as users get it: wheel, sdist, editable, without a compiler, and from the source tree by mistake.

Each installation goes into an environment of its own that borrows every other package from the running one:
nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]
pytestmark = pytest.mark.xdist_group("install")  # one worker: the wheel is built once

USE = """
import torch
import dpfast
from dpfast.kernels import dispatch
from dpfast.kernels.affine import affine_grads
weight, bias = affine_grads(torch.ones(2, 3, 16, 5), torch.ones(2, 3, 16, 5))
assert weight.shape == bias.shape == (2, 16) and (weight == 15).all() and (bias == 15).all()
model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
with dpfast.GhostClipper(model, max_grad_norm=1.0, augmult=1) as clipper:
    clipper.backward(model(torch.ones(3, 2, 4, 4)).square().sum(1))
assert all(p.grad.isfinite().all() for p in model.parameters())
print(dispatch.backend(), dpfast.__file__)
"""


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """All output of a command that must succeed, in an environment without this process's settings."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DPFAST_BACKEND")}
    done = subprocess.run(command, cwd=cwd, env=clean | (env or {}), text=True, stdout=PIPE, stderr=STDOUT)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def _environment(folder: Path) -> Path:
    """A fresh environment's python; packages come from the running environment, dpfast does not.

    Folders named in a .pth file are searched last and their own .pth files are not read, so no installation
    of dpfast in the running environment hides the one under test.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "borrowed.pth").write_text("\n".join(sorted(paths)) + "\n")
    return python


def _install(python: Path, *what: str, env: dict[str, str] | None = None) -> str:
    return _run(*PIP, "--python", python, "install", "-v", *OFFLINE, *what, cwd=ROOT, env=env)


def _has_compiler() -> bool:
    from dpfast.kernels import dispatch

    return dispatch._find_native()[0] is not None


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built through the sdist as for a release."""
    out = tmp_path_factory.mktemp("dist")
    build = "import sys; from scikit_build_core import build; print(build.build_sdist(sys.argv[1]))"
    sdist = out / _run(sys.executable, "-c", build, str(out), cwd=ROOT).split()[-1]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/cpu/affine.cpp", "kernels/dispatch.py", "dpfast/py.typed"} <= names
    _run(*PIP, "wheel", *OFFLINE, "-w", out, sdist, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment in which the wheel is installed."""
    python = _environment(tmp_path_factory.mktemp("wheel") / "env")
    _install(python, str(wheel))
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dpfast", "dpfast-0.1.0.dist-info"}
    assert {"dpfast/py.typed", "dpfast/kernels/affine/reference.py"} <= set(names)
    native = [name for name in names if name.startswith("dpfast/_native.") and not name.endswith(".pyi")]
    assert len(native) == _has_compiler()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works(installed: Path, tmp_path: Path) -> None:
    backend, path = _run(installed, "-c", USE, cwd=tmp_path).split()
    assert backend == ("native" if _has_compiler() else "reference")
    assert not Path(path).is_relative_to(ROOT)


@pytest.mark.timeout(900)
def test_every_snippet_of_the_documentation_runs(installed: Path, tmp_path: Path) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    runner = shutil.copy(ROOT / "tests" / "snippets.py", tmp_path)
    said = _run(installed, "-W", "error", runner, *pages, cwd=tmp_path).splitlines()
    assert not Path(said[0].removeprefix("dpfast ")).is_relative_to(ROOT)
    assert [line.partition(":")[0] for line in said[1:]] == [page.name for page in pages]
    assert sum(int(line.split()[1]) for line in said[1:]) > 30


def test_the_source_tree_beside_a_wheel_says_what_to_do(installed: Path) -> None:
    done = subprocess.run([installed, "-c", "import dpfast"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dpfast is installed, but Python found its source tree")
    assert "Run Python from another folder" in last
    assert "pip install -e" in last


def test_the_source_tree_alone_says_what_to_do(tmp_path: Path) -> None:
    python = _environment(tmp_path / "env")
    # The borrowed packages may hold an installation of dpfast: hide what they say of it.
    hide = "import importlib.metadata as m; m.version = lambda name: m.distribution('no'); import dpfast"
    done = subprocess.run([python, "-c", hide], cwd=ROOT, text=True, capture_output=True)
    assert "ImportError: dpfast is imported from its source tree" in done.stderr
    assert "pip install -e" in done.stderr


def test_editable_works_from_anywhere_and_without_a_compiler(tmp_path: Path) -> None:
    python = _environment(tmp_path / "env")
    builder = next(path for name in ("ninja", "make") if (path := shutil.which(name)))
    (python.parent / Path(builder).name).symlink_to(builder)
    nothing = {"CXX": "/nonexistent", "CC": "/nonexistent", "PATH": str(python.parent)}
    log = _install(python, "-e", str(ROOT), env=nothing)
    assert "installing WITHOUT the native module" in log
    for folder in (tmp_path, ROOT):
        backend, path = _run(python, "-c", USE, cwd=folder).split()
        assert backend == "reference"
        assert Path(path).is_relative_to(ROOT)
    why = "from dpfast.kernels import dispatch; print(dispatch.why_not_native())"
    assert "installed without a C++ compiler" in _run(python, "-c", why, cwd=tmp_path)


@pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler")
def test_editable_has_the_native_module(tmp_path: Path) -> None:
    python = _environment(tmp_path / "env")
    _install(python, "-e", str(ROOT))
    for folder in (tmp_path, ROOT):
        backend, path = _run(python, "-c", USE, cwd=folder).split()
        assert backend == "native"
        assert Path(path).is_relative_to(ROOT)
