"""Parameters -> recorded (a, g) -> squared norms -> clip factors -> clipped sum.

The only place where gradients of private data exist. Read in this order: ``capture`` (which calls use a trainable
parameter), ``derived`` (what is made of parameters alone), ``rules`` and ``fallback`` (how), ``tape`` (what the
backward pass reports), ``ownership`` and ``calls`` (whose rows), ``terms`` and ``forms`` (in which form),
``accumulate`` and ``passes`` (norms, factors, sums), ``watch`` (what must not change), ``losses`` (what is asked of
them), ``clipper`` (the API), ``planner`` (what it will cost).
"""

from dpfast.clipping.clipper import ClipResult, GhostClipper
from dpfast.clipping.planner import StepPlan, plan_step

__all__ = ["ClipResult", "GhostClipper", "StepPlan", "plan_step"]
