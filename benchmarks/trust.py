"""The table in docs/guarantee.md of what the tests have tried in full: ``python -m benchmarks.trust``.

The rows of results/trust.jsonl are written by the tests themselves (tests/trust.py), under ``make trust``.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import results


def sensitivity(row: dict[str, Any]) -> tuple[str, str, str]:
    excess = ", ".join(f"{value:+.1e} in {dtype}" for dtype, value in row["excess"].items())
    tried = f"{row['cases']:,} cases (form, dtype, layout, K) of {row['architectures']} random networks"
    return "sensitivity", tried, f"the most that was measured over what is promised: {excess}"


def cuts(row: dict[str, Any]) -> tuple[str, str, str]:
    ended = ", ".join(f"{name} {count}" for name, count in sorted(row["ended"].items()))
    tried = f"{row['cuts']} processes of {row['finished']} runs, each ended by chance"
    return "interruptions", tried, f"none lost; how they ended: {ended}"


def fuzzing(row: dict[str, Any]) -> tuple[str, str, str]:
    inputs = ", ".join(f"{count:,} {name}" for name, count in row["inputs"].items())
    tried = f"{sum(row['inputs'].values()):,} damaged inputs: {inputs}"
    return "fuzzing", tried, "every one was used as it was meant, or refused with an error of dpfast's"


KINDS: dict[str, Callable[[dict[str, Any]], tuple[str, str, str]]] = {
    "sensitivity": sensitivity,
    "cuts": cuts,
    "fuzzing": fuzzing,
}


def table(rows: list[dict[str, Any]]) -> str:
    """The newest result of each kind."""
    newest = {row["name"]: row for row in rows}
    lines = [("what", "tried", "found"), ("---",) * 3]
    lines += [shown(newest[name]) for name, shown in KINDS.items() if name in newest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    text = table(results.rows("trust"))
    results.write_between_markers(results.ROOT / "docs/guarantee.md", "trust", text)
    print(text)


if __name__ == "__main__":
    main()
