"""Each op of ``dpfast.kernels`` against what torch offers: ``python -m pytest benchmarks/kernels --benchmark-only``."""
