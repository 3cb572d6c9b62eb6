"""``python -m benchmarks.kernels``: the tables in ``benchmarks/README.md``, from the committed results."""

from benchmarks.kernels.speed import write_tables

if __name__ == "__main__":
    print(*write_tables(), sep="\n\n")
