"""dpfast's docstrings as reStructuredText, for ``conf.py``.

They are written to be read in the source: plain text, names in double backticks, indented blocks for code and formulas,
``- `` for lists, and parameters as ``name: text``. Here each of these becomes what Sphinx shows well, and nothing else
in them is markup: a ``*`` is a star and ``|G_i|`` is a norm.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

_ITEM = re.compile(r"(?P<indent> *)(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (?P<text>\S.*)")
_NEXT = re.compile(r"(?<=[.;]) (\w+): ")
_LEAD = re.compile(r"(Guarantee): ")
_CODE = re.compile(r"(``.+?``)")
_MARKUP = re.compile(r"([\\*`|_])")


def to_rest(lines: Sequence[str], names: Collection[str] = (), links: Mapping[str, str] | None = None) -> list[str]:
    """A docstring's lines as lines of reStructuredText.

    names: that may begin an item of a list of parameters. links: what to refer to where a name in double backticks
    stands for something that has a place in the documentation.
    """
    found: list[str] = []
    after = "text"  # what the paragraph before was: an indented one after a list belongs to its last item
    for paragraph in _paragraphs(lines):
        if paragraph[0].startswith(" ") and after != "list":
            found += _literal(paragraph, goes_on=after == "literal")
            after = "literal"
        elif paragraph[0].startswith(" "):
            found += [f"  {_inline(_joined(paragraph), links)}", ""]
        else:
            items = _items(paragraph, names)
            found += [*_text(items, links), ""]
            after = "list" if items[-1][0] else "text"
    return found


def parameter_names(of: Any) -> set[str]:
    """Of a function, or of a class: what it is made with, and its public attributes."""
    names = {field.name for field in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else set()
    if inspect.isclass(of):
        names |= {name for name in vars(of) if not name.startswith("_")}
    try:
        return names | set(inspect.signature(of).parameters)
    except (TypeError, ValueError):
        return names


def _paragraphs(lines: Sequence[str]) -> Iterator[list[str]]:
    for blank, run in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield list(run)


def _literal(paragraph: list[str], *, goes_on: bool) -> list[str]:
    """A block of its own, highlighted if it is Python; or the next paragraph of the block before."""
    body = [*(f"   {line}".rstrip() for line in paragraph), ""]
    return body if goes_on else [f".. code-block:: {'python' if _is_python(paragraph) else 'text'}", "", *body]


def _is_python(lines: Sequence[str]) -> bool:
    try:
        ast.parse(textwrap.dedent("\n".join(lines)))
    except SyntaxError:
        return False
    return True


def _items(paragraph: Sequence[str], names: Collection[str]) -> list[tuple[str, str]]:
    """(head, text) of the text before a list, with an empty head, and of each item."""
    items: list[tuple[str, list[str]]] = []
    for line in paragraph:
        item = _item(line, names)
        if item:
            items.append((_head(item["names"]), [item["text"]]))
        elif line.lstrip().startswith("- "):
            items.append(("* ", [line.lstrip()[2:]]))
        elif items:
            items[-1][1].append(line)
        else:
            items.append(("", [line]))
    return [part for head, text in items for part in _parted(head, _joined(text), names)]


def _head(named: str) -> str:
    return "* " + ", ".join(f"**{_escaped(name)}**" for name in named.split(", ")) + ": "


def _parted(head: str, text: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Items that follow one another on a line, ``seed: of A. rank: of B``, one by one."""
    at = 0
    for following in _NEXT.finditer(text):
        if following[1] in names:
            yield head, text[at : following.start()].rstrip(".;") + "."
            head, at = _head(following[1]), following.end()
    yield head, text[at:]


def _item(line: str, names: Collection[str]) -> re.Match[str] | None:
    """Whether a line begins an item: with parameters, or with an error in an indented list of them."""
    match = _ITEM.match(line)
    if match is None:
        return None
    is_error = bool(match["indent"]) and match["names"][0].isupper()
    return match if is_error or all(name in names for name in match["names"].split(", ")) else None


def _text(items: Sequence[tuple[str, str]], links: Mapping[str, str] | None) -> list[str]:
    found: list[str] = []
    for head, text in items:
        if head:
            found.append(head + _inline(text, links))
        else:
            lead = _LEAD.match(text)
            plain = _inline(text[lead.end() :] if lead else text, links)
            plain = plain.removesuffix("::") + ":" if plain.endswith("::") else plain
            found += [f"**{lead[1]}:** {plain}" if lead else plain, ""]
    return found


def _inline(text: str, links: Mapping[str, str] | None) -> str:
    """Code as code, or as a link; all else escaped."""
    parts = _CODE.split(text)
    return "".join(
        _code(part, links or {}) if part.startswith("``") and i % 2 else _escaped(part) for i, part in enumerate(parts)
    )


def _code(quoted: str, links: Mapping[str, str]) -> str:
    name = quoted.strip("`")
    return f":py:obj:`{name} <{links[name]}>`" if name in links else quoted


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)


def _joined(lines: Sequence[str]) -> str:
    return " ".join(line.strip() for line in lines)
