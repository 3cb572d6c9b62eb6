"""Imported by the process whose forks ``cuts`` runs: it has done such a run, so that all is imported and calibrated."""

import tempfile
from pathlib import Path

import torch

from cuts import SETTINGS
from dpfast.recipes import load
from dpfast.runs.pipeline import execute
from test_runs import Recorder

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as _folder:
    execute(load("digits", SETTINGS), Path(_folder), Recorder())
