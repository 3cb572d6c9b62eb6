"""``python -m benchmarks.predicted``: the table of predictions in the README, which nobody has measured."""

from benchmarks import results
from dpfast.progress import silent
from dpfast.runs.elsewhere import AUGMULTS, Setting, compared

DEVICE = "h200"
TARGETS = {1: (1.15, 1.05), 4: (1.10, 1.05), 16: (1.06, 1.05), 128: (1.03, 1.05)}  # time, memory


def table() -> str:
    setting = Setting.of_paper()
    head, *rows = compared(setting.plans(DEVICE, silent))
    lines = [(*head, "*target*"), ("---",) * (1 + len(head))]
    for augmult, row in zip(AUGMULTS, rows, strict=True):
        lines.append((*row, "*{:.2f}, {:.2f}*".format(*TARGETS[augmult])))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    written = table()
    results.write_between_markers(results.ROOT / "README.md", "predicted", written)
    print(written)
