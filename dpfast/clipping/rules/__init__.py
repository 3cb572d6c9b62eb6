"""How torch functions use their trainable parameters: one rule per function, looked up in ``table``.

A rule has the signature of the function it stands for, with ``is_tracked`` in front. It returns the ``Use``, or None
when the call is not of the form it knows (``capture`` then falls back to per-example vector-Jacobian products), or a
``Problem``. Shapes in the comments use the alphabet of ``dpfast.kernels``: B examples, N rows, M rows per example,
D inputs, P outputs, C channels, S positions.
"""
