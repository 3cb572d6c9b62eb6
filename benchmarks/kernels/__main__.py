"""``python -m benchmarks.kernels``: the table in ``benchmarks/README.md``, from the committed results."""

from benchmarks import results
from benchmarks.kernels.speed import table

if __name__ == "__main__":
    text = table(results.rows("kernels"))
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "kernels", text)
    print(text)
