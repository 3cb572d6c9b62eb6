"""Runs mypy on dpfast as it is installed: with kernels/ at dpfast/kernels, through a folder of links."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / ".typecheck"


def main() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "dpfast"
    package.mkdir(parents=True)
    for source in [*(ROOT / "dpfast").iterdir(), ROOT / "kernels"]:
        (package / source.name).symlink_to(source)
    os.chdir(ROOT)
    os.environ["MYPYPATH"] = str(TREE)
    os.execv(sys.executable, [sys.executable, "-m", "mypy", "-p", "dpfast", *sys.argv[1:]])


if __name__ == "__main__":
    main()
