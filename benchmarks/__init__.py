"""Benchmarks: correctness first, then the clock. Results are data in ``benchmarks/results``; tables come from them."""
