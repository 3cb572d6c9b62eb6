"""What makes each script in examples/ private, counted and written into examples/README.md.

    python tools/example_diffs.py           # writes the table and the differences
    python tools/example_diffs.py --check   # says whether they are those of the scripts

Counted are the lines that a unified diff (``difflib``) adds and those that it removes, comments and blank lines
included; a script changes as many lines as the larger of the two.
"""

import difflib
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples"
MOST = 8  # lines of a script that may change


def pairs() -> list[tuple[Path, Path]]:
    """(ordinary, private) scripts."""
    return [
        (private.with_name(private.name.replace("_private", "")), private)
        for private in sorted(FOLDER.glob("*_private.py"))
    ]


def difference(ordinary: Path, private: Path, context: int = 0) -> list[str]:
    """Lines of the unified diff, less its two lines of file names."""
    before, after = (path.read_text().splitlines() for path in (ordinary, private))
    return list(difflib.unified_diff(before, after, n=context, lineterm=""))[2:]


def changed(lines: list[str]) -> tuple[int, int]:
    """How many lines are added, and how many are removed."""
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def shown() -> str:
    """The differences as Markdown, each with its count."""
    parts = []
    for ordinary, private in pairs():
        lines = difference(ordinary, private)
        added, removed = changed(lines)
        lines = ["" if line.startswith("@@") else line for line in lines][1:]
        body = "\n".join(["```diff", *lines, "```"])
        parts.append(f"`{private.name}`: {added} lines added, {removed} removed\n\n{body}")
    return "\n\n".join(parts)


def page(text: str) -> str:
    """``text`` of the README with the differences of now."""
    begin, end = "<!-- differences: begin (python tools/example_diffs.py) -->", "<!-- differences: end -->"
    return re.sub(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", lambda _: shown() + "\n", text, flags=re.DOTALL)


def main() -> int:
    readme = FOLDER / "README.md"
    text = readme.read_text()
    if "--check" in sys.argv:
        return int(page(text) != text)
    readme.write_text(page(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
