"""What dpfast computes: one folder per op, the formula in ``reference.py``, a compiled version beside it.

Importing this package imports no op and looks for no native module; that happens at first use (``dispatch``).
"""
