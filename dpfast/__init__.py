"""dpfast: differentially private fine-tuning of diffusion models.

    GhostClipper    per-example clipping for any model in any loop
    Plan            everything that moves epsilon
    DPOptimizer     the one place where a private sum becomes an update
    DPTrainer       a model, a data set and a plan in; a privately trained model out
    PrivacyEngine   the same for a training loop of Opacus, after changing its import
    Ledger          the steps spent, on disk before they are taken
    Performance     how it is computed; cannot move epsilon
    poisson_sample  which examples take part in a step

Names are imported at first use: ``import dpfast`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpfast._installed import require_installed

if TYPE_CHECKING:
    from dpfast.clipping import ClipResult, GhostClipper
    from dpfast.engine import PrivacyEngine
    from dpfast.errors import DPFastError
    from dpfast.optimizer import DPOptimizer
    from dpfast.performance import Performance
    from dpfast.privacy import Ledger, Plan, poisson_sample
    from dpfast.trainer import DPTrainer

__all__ = [
    "ClipResult",
    "DPFastError",
    "DPOptimizer",
    "DPTrainer",
    "GhostClipper",
    "Ledger",
    "Performance",
    "Plan",
    "PrivacyEngine",
    "poisson_sample",
]

_HOME = {
    "ClipResult": "dpfast.clipping",
    "DPFastError": "dpfast.errors",
    "DPOptimizer": "dpfast.optimizer",
    "DPTrainer": "dpfast.trainer",
    "GhostClipper": "dpfast.clipping",
    "Ledger": "dpfast.privacy",
    "Performance": "dpfast.performance",
    "Plan": "dpfast.privacy",
    "PrivacyEngine": "dpfast.engine",
    "poisson_sample": "dpfast.privacy",
}

require_installed()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpfast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
