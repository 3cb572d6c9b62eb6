"""One clear error when Python finds the source tree instead of the installed package."""

import importlib.metadata
import importlib.util
from pathlib import Path


def require_installed() -> None:
    """Check that ``dpfast.kernels`` is where this ``dpfast`` is; a bare source tree keeps it elsewhere.

    Raises:
        ImportError: it is not, with the cure.
    """
    if importlib.util.find_spec("dpfast.kernels") is not None:
        return
    here = Path(__file__).resolve().parents[1]
    try:
        importlib.metadata.version("dpfast")
        cause = f"dpfast is installed, but Python found its source tree at {here} first"
        cure = f"Run Python from another folder, or install the source tree itself: pip install -e {here}"
    except importlib.metadata.PackageNotFoundError:
        cause = f"dpfast is imported from its source tree at {here} and not installed"
        cure = f"Install it: pip install -e {here}"
    raise ImportError(f"{cause}. {cure}")
