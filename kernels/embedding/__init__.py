"""Per-example gradients of an embedding table, their squared norms and their clipped sum.

Shapes: ``index [B, M]`` rows of the table looked up, ``g [B, M, D]`` gradients of what was looked up; the gradient
of example i is ``[V, D]`` with ``G_i[v] = sum over m with index[i,m] = v of g[i,m]``.
"""

from dpfast.kernels.embedding.reference import clipped_sum, direct_sq_norms, gram_sq_norms, per_example_grads

__all__ = ["clipped_sum", "direct_sq_norms", "gram_sq_norms", "per_example_grads"]
