"""What a person needs to know when something does not work: versions, devices, threads, disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dpfast.errors import DPFastError

PACKAGES = ("dpfast", "torch", "diffusers", "dp-accounting", "torchmetrics", "scikit-learn", "matplotlib", "numpy")


def examine(folder: Path) -> list[tuple[str, str]]:
    """(what, finding) for this installation; ``folder`` is where runs would be written."""
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("native module", _native()),
        ("GPU kernels", _triton()),
        ("device", _device()),
        ("threads", _threads()),
        ("free disk", _disk(folder)),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _native() -> str:
    from dpfast.kernels.dispatch import backend, why_not_native

    try:
        backend()
    except DPFastError as error:
        return f"no op runs: {error}"
    reason = why_not_native()
    return "used" if reason is None else f"not used, PyTorch does its work: {reason}"


def _triton() -> str:
    from dpfast.kernels.dispatch import is_interpreting, why_not_triton

    reason = why_not_triton()
    if reason is not None:
        return f"not used: {reason}"
    return f"Triton {_version('triton')}{', interpreted on the CPU where it is asked for' if is_interpreting() else ''}"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"cpu, cuda ({', '.join(names)})"


def _threads() -> str:
    import torch

    limit = os.environ.get("OMP_NUM_THREADS")
    asked = f", OMP_NUM_THREADS={limit}" if limit else ""
    return f"{torch.get_num_threads()} used by torch, {os.cpu_count()} cores{asked}"


def _disk(folder: Path) -> str:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e9:.1f} GB at {place}"
