"""Where things run: on a GPU, or, to try the programs, on the CPU."""

import functools
import importlib.util
import shutil

from benchmarks.gpu.jobs import Missing

NEEDS = {
    "tests": ("triton", "pytest"),
    "kernels": ("triton",),
    "launches": ("triton",),
    "step": ("diffusers", "opacus"),
}
NO_SANITIZER = "compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin"


@functools.cache
def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require(*packages: str) -> None:
    """
    Raises:
        Missing: one cannot be imported.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Missing(f"{name} cannot be imported ({error})") from error


def why_no_gpu(*, dry: bool) -> str | None:
    """Why nothing is measured here, if nothing is."""
    try:
        require("torch")
    except Missing as reason:
        return str(reason)
    return None if dry or device() == "cuda" else "torch sees no GPU (DRY=1 tries the programs on the CPU)"


def lacking(part: str) -> list[str]:
    """What else a part misses."""
    return [*not_installed(*NEEDS[part]), *([NO_SANITIZER] if part == "tests" and sanitizer() is None else [])]


def not_installed(*packages: str) -> list[str]:
    return [f"{name} is not installed" for name in packages if importlib.util.find_spec(name) is None]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
