"""Clip factors from squared norms, and the clipped sum of stored per-example gradients.

Shapes: ``sq [B]`` squared norms over all parameters, ``w [B]`` factors, ``grads [B, ...]`` gradients of one parameter.
"""

from dpfast.kernels.clip.reference import clip_factors, clipped_sum, sq_norms

__all__ = ["clip_factors", "clipped_sum", "sq_norms"]
