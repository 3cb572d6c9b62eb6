"""Where things run: on a GPU, or, to try the programs, on the CPU."""

import functools
import importlib

from benchmarks.gpu.jobs import Missing


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
