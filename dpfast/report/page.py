"""The frame of a report: one HTML file with its style inside, readable on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from dpfast.report.figures import data_uri, strip

COLUMNS = 12  # images of a class that are shown

_STYLE = """
:root { --ink: #16232e; --muted: #5b6b78; --accent: #0b6e75; --line: #dde4ea; --soft: #f4f7f9;
  --alarm: #a3161f; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main, .banner div { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
.banner { padding: .8rem 0; font-weight: 650; color: #fff; background: var(--alarm); }
header { padding: 2.25rem 0 .25rem; }
.kicker { margin: 0; color: var(--accent); font-size: .8rem; font-weight: 650; letter-spacing: .06em;
  text-transform: uppercase; }
h1 { margin: .3rem 0 .6rem; font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.18;
  letter-spacing: -.015em; }
h2 { margin: 2.8rem 0 .5rem; font-size: 1.25rem; letter-spacing: -.01em; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
p, ul { max-width: 44rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
.lead { font-size: 1.08rem; color: #33424e; }
.note, figcaption { color: var(--muted); font-size: .88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.card { padding: .85rem 1rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--soft); }
.card b { display: block; font-size: 1.45rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .85rem; }
.alarm { border-color: var(--alarm); color: var(--alarm); } .alarm span { color: var(--alarm); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.75rem; }
figure { margin: .9rem 0 0; min-width: 0; }
figcaption { margin-top: .45rem; }
.strips { display: grid; grid-template-columns: max-content 1fr; gap: 3px .6rem; align-items: center; }
.strips span { color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums; }
.strips img { display: block; width: 100%; image-rendering: pixelated; }
svg, .plot { display: block; width: 100%; height: auto; }
.plot { max-width: 46rem; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { width: 100%; max-width: 46rem; border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--muted); font-size: .82rem; font-weight: 600; }
td.number, th.number { padding: .5rem 0 .5rem 1rem; text-align: right; white-space: nowrap; }
tr.main td { font-weight: 650; background: var(--soft); }
tr.main td:first-child { box-shadow: inset 3px 0 var(--accent); padding-left: .7rem; }
td small { display: block; color: var(--muted); font-size: .84rem; font-weight: 400; }
.bar { height: .5rem; margin-top: .45rem; border-radius: .25rem; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: .25rem; background: #9bb3bd; }
tr.main .bar i { background: var(--accent); }
pre { padding: 1rem; overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--soft); font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; margin: .5rem 0; }
footer { margin: 3rem 0 2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media print { body { font-size: 11pt; } h2 { break-after: avoid; } figure, .card, tr { break-inside: avoid; }
  .card, pre, tr.main td, .bar, .bar i, .banner { print-color-adjust: exact; } }
"""


def page(title: str, body: Iterable[str], *, banner: str | None = None) -> str:
    """A whole document. banner: shown before everything else, in white on red."""
    top = f'<div class="banner" role="alert"><div>{escape(banner)}</div></div>\n' if banner else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{top}<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, lead: str) -> str:
    """The head of the page; ``lead`` may hold HTML."""
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>'


def section(title: str, *parts: str) -> str:
    """A section; ``parts`` are HTML."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def bullets(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def cards(entries: Iterable[tuple[str, str]], *, alarm: bool = False) -> str:
    """Key figures as (figure, what it is); with ``alarm`` the first stands out in red."""
    drawn = [
        f'<div class="card{" alarm" if alarm and i == 0 else ""}"><b>{escape(value)}</b>'
        f"<span>{escape(meaning)}</span></div>"
        for i, (value, meaning) in enumerate(entries)
    ]
    return '<div class="cards">' + "".join(drawn) + "</div>"


def figure(content: str, caption: str) -> str:
    """HTML or SVG with a caption below."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def image(png: bytes, label: str) -> str:
    """A picture, read aloud as ``label``."""
    return f'<img class="plot" src="{data_uri(png)}" alt="{escape(label)}">'


def sample_rows(images: Tensor, labels: Tensor, classes: Sequence[str], *, columns: int = COLUMNS) -> str:
    """The first ``columns`` images of each class, one class to a row. images: uint8 ``[n, C, H, W]``."""
    rows = []
    for index, name in enumerate(classes):
        chosen = images[(labels == index).nonzero().flatten()[:columns]]
        if len(chosen):
            said = f"{len(chosen)} images of class {escape(name)}"
            picture = f'<img src="{data_uri(strip(chosen))}" alt="{said}">'
            rows.append(f"<span>{escape(name)}</span>{picture}")
    return '<div class="strips">' + "".join(rows) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; ``numbers`` are the columns set flush right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """HTML shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def code(text: str) -> str:
    """Plain text in a fixed font."""
    return f"<pre>{escape(text)}</pre>"
