"""``python -m dpfast``: the command ``dpfast``, as ``torchrun -m dpfast`` starts it."""

from dpfast.cli import main

if __name__ == "__main__":
    main()
