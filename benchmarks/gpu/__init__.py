"""Tests, ops and steps on a GPU, and a page of them: ``make gpu``, or ``python -m benchmarks.gpu``."""
