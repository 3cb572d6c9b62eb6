"""PrivacyEngine: the call shapes of ``opacus.PrivacyEngine``, over dpfast's clipper, optimizer and ledger.

Read in this order: ``engine`` (the API), ``loader`` and ``memory`` (Poisson samples, in physical batches),
``module`` and ``session`` (what one batch goes through, from the loader to ``optimizer.step()``), ``outputs`` (where
the user's losses are cut off from the model), ``between`` (the mode that sees ``loss.backward()``); that the user's
code keeps examples apart: ``batches``, ``exchange``, ``readings``, ``shadows``, ``compare``, ``fewer``, ``padding``,
``collation``, ``beside``; ``optimizer``, ``accountant``.
"""

from dpfast.engine.engine import PrivacyEngine
from dpfast.engine.loader import PrivateLoader
from dpfast.engine.memory import BatchMemoryManager
from dpfast.engine.module import PrivateModule
from dpfast.engine.optimizer import PrivateOptimizer

__all__ = ["BatchMemoryManager", "PrivacyEngine", "PrivateLoader", "PrivateModule", "PrivateOptimizer"]
