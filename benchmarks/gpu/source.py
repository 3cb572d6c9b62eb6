"""Which dpfast is measured: the one of this checkout, though another may be installed."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT


def prefer_path() -> None:
    """Where ``sys.path`` has a whole dpfast, the finders of editable installations, which come before it, make way."""
    found = PathFinder.find_spec("dpfast")
    if found is not None and found.origin is not None and (Path(found.origin).parent / "kernels").exists():
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is PathFinder or not knows_dpfast(finder)]


def knows_dpfast(finder: Any) -> bool:
    return hasattr(finder, "find_spec") and finder.find_spec("dpfast", None) is not None


def source() -> Path | None:
    """The folder that dpfast is imported from."""
    spec = importlib.util.find_spec("dpfast")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def foreign() -> str | None:
    """Why not to measure what is imported: rows carry the commit of this checkout."""
    spec = importlib.util.find_spec("dpfast")
    if spec is None or spec.origin is None:
        return f"dpfast is not there: make gpu finds it, or PYTHONPATH={ROOT / 'build/gpu'}"
    if Path(spec.origin).resolve().is_relative_to(ROOT / "dpfast"):
        return None
    return f"dpfast comes from {source()}, not from this checkout: uninstall it there, or take another GPU_PYTHON"
