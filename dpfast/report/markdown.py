"""The little Markdown that privacy statements are written in (headings, lists, a table, bold), as HTML."""

from __future__ import annotations

import re
from html import escape


def first_section(text: str) -> str:
    """What stands between the first heading and the second."""
    return re.split(r"^#+ .*$", text, maxsplit=2, flags=re.MULTILINE)[1].strip()


def to_html(text: str) -> str:
    """HTML of ``text``; whatever looks like HTML in it is shown, not obeyed."""
    return "\n".join(_block(block.strip()) for block in re.split(r"\n\s*\n", text) if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    heading = re.match(r"(#+) (.*)", lines[0])
    if heading:
        rest = "\n".join(lines[1:])
        return f"<h3>{_inline(heading[2])}</h3>" + (_block(rest) if rest else "")
    if lines[0].startswith("- "):
        items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(item.strip())}</li>" for item in items) + "</ul>"
    if lines[0].startswith("|"):
        return _table(lines)
    return f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    body = [row for row in rows if any(cell.strip("-") for cell in row)]
    cells = ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in body]
    return '<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>"


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
