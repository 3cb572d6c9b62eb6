"""The command ``dpfast``, and the threads that are left at its end: ``python command_worker.py FOLDER ARGUMENTS``.

It imports nothing that the command would import later.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path


def threads() -> list[str]:
    """The names of this process's threads."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def note(folder: str) -> None:
    """Them, a line each."""
    Path(folder, f"threads-{os.environ['RANK']}").write_text("\n".join(threads()))


if __name__ == "__main__":
    atexit.register(note, sys.argv.pop(1))
    runpy.run_module("dpfast", run_name="__main__")
