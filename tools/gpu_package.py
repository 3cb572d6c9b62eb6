"""Makes dpfast importable from a folder of links, without an installation: usage: python tools/gpu_package.py FOLDER.

With the native module if it can be built from what is installed here; without it where not, and says so.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    package = Path(sys.argv[1]) / "dpfast"
    package.mkdir(parents=True, exist_ok=True)
    for old in [path for path in package.iterdir() if path.is_symlink()]:
        old.unlink()
    for source in [*(ROOT / "dpfast").glob("[!_]*"), *(ROOT / "dpfast").glob("_*.py"), ROOT / "kernels"]:
        (package / source.name).symlink_to(source)
    if not is_new(package) and (reason := built(package)):
        print(f"skipped: the native module (for the CPU): {reason}")


def is_new(package: Path) -> bool:
    """Whether the native module there is of these sources and this Python."""
    found = list(package.glob(f"_native*{sys.version_info.major}{sys.version_info.minor}*"))
    newest = max(path.stat().st_mtime for path in (ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")))
    return bool(found) and found[0].stat().st_mtime > newest


def built(package: Path) -> str | None:
    """Why not, if it is not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
        done = subprocess.run([*command, "-w", folder, str(ROOT)], capture_output=True, text=True, check=False)
        if done.returncode:
            return " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("dpfast/_native.")]
            archive.extractall(folder, names)
        for name in names:
            shutil.copyfile(Path(folder) / name, package / Path(name).name)
    return None if names else "no C++ compiler, or no headers of Python"


if __name__ == "__main__":
    main()
