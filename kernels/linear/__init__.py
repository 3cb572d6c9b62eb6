"""Per-example weight gradients of a linear map, their squared norms and their clipped sum.

Shapes: ``a [B, ..., M, D]`` inputs and ``g [B, ..., M, P]`` output gradients of B examples, each with M rows
(augmentations times positions); the dots are independent groups. ``G_i = sum_m g[i,m] (x) a[i,m]`` is ``[..., P, D]``.

    form         norms                    stores
    gram         2 B M^2 (D + P) FLOPs    two [M, M] matrices per example (half of it by symmetry, not used yet)
    direct       2 B M D P FLOPs          one G_i at a time
    materialise  2 B M D P FLOPs          every G_i
"""

from dpfast.kernels.linear.reference import clipped_sum, direct_sq_norms, gram_sq_norms, per_example_grads

__all__ = ["clipped_sum", "direct_sq_norms", "gram_sq_norms", "per_example_grads"]
