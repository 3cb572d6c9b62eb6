"""Tests, ops and steps on a GPU, and a page of them: ``make gpu``, or ``python -m benchmarks.gpu``."""

from benchmarks.gpu.source import prefer_path

prefer_path()  # here: every process of these programs imports this first, those of pytest by ``reports``
