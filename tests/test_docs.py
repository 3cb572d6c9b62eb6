"""The pages of docs/: their snippets run and print what they say, their commands and links exist, their site builds."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import snippets

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = [DOCS / f"{name}.md" for name in ("quickstart", "own-unet", "choosing", "statement")]
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ALL = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _has_snippets(path: Path) -> bool:
    return any(snippet.language in ("python", "sh") for snippet in snippets.snippets(path.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if _has_snippets(page)], ids=_ids)
def test_snippets_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    snippets.check_page(page, tmp_path)  # those of the README: tests/test_readme.py


def test_hardly_a_block_is_left_out() -> None:
    assert all(_has_snippets(page) for page in GUIDES)
    for page in PAGES:
        languages = re.findall(r"^```(\S*)\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        assert set(languages) <= {"python", "sh", "text", "toml", "{toctree}", "{eval-rst}"}, page
        shown = [snippet.output for snippet in snippets.snippets(page.read_text()) if snippet.output is not None]
        assert languages.count("text") - len(shown) <= 1, f"{page}: text that no snippet prints"


def test_another_output_is_noticed_and_can_be_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\nText.\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n\nMore.\n")
    with pytest.raises(AssertionError, match=r"page\.md: what the snippet of line 8 prints has changed"):
        snippets.check_page(page, tmp_path)
    assert snippets.write_page(page, tmp_path) == 2
    assert page.read_text().endswith("```text\n2\n```\n\nMore.\n")
    assert snippets.check_page(page, tmp_path) == 2


def test_an_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nraise ValueError(x)\n```\n")
    with pytest.raises(ValueError, match="1") as error:
        snippets.check_page(page, tmp_path)
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 5)


def _command_lines(page: str) -> Iterator[str]:
    """Calls of dpfast in blocks marked ``sh``, and in indented ones."""
    blocks = [snippet.code for snippet in snippets.snippets(page) if snippet.language == "sh"]
    indented = [line for line in page.splitlines() if line.startswith("    ")]
    for line in [*"".join(blocks).splitlines(), *indented]:
        for call in line.split("&&"):
            if re.match(r"\s*(\.venv/bin/)?dpfast [a-z]", call):
                yield shlex.join(shlex.split(call, comments=True)[1:])


COMMANDS = sorted({(path, line) for path in ALL for line in _command_lines(path.read_text())})


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_commands_are_ones_that_dpfast_knows(page: Path, line: str) -> None:
    from dpfast.cli import app

    _parse(typer.main.get_command(app), "dpfast", shlex.split(line))


def _parse(command: Any, name: str, words: list[str], parent: Any = None) -> None:
    """As a call would, and nothing else: raises what is shown for an option that does not exist."""
    with command.make_context(name, list(words), parent=parent) as context:
        if hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(context, list(words))
            _parse(command, name, words, context)


def test_an_option_that_does_not_exist_is_noticed() -> None:
    from dpfast.cli import app

    with pytest.raises(Exception, match="No such option"):
        _parse(typer.main.get_command(app), "dpfast", ["account", "--batchsize", "3"])
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("page", ALL, ids=_ids)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if DOCS in page.parents:  # what the site does not have, a page names without a link
            assert DOCS in other.parents, target
        if anchor:
            assert anchor in _anchors(other.read_text()), target


def _anchors(page: str) -> set[str]:
    """Of headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text()
    named = {(DOCS / target).resolve() for target in re.findall(r"\]\(([\w/-]+\.md)\)", index)}
    assert named == {page for page in PAGES if page.parent == DOCS} - {DOCS / "index.md"} | {DOCS / "api" / "index.md"}


def test_every_public_package_has_a_page() -> None:
    public = {"dpfast", "dpfast.errors", "dpfast.testing"}
    for path in (ROOT / "dpfast").glob("*/__init__.py"):
        if "__all__" in path.read_text():
            public.add(f"dpfast.{path.parent.name}")
    index = (DOCS / "api" / "index.md").read_text()
    for package in public:
        name = package.rpartition(".")[2]
        assert f".. automodule:: {package}\n" in (DOCS / "api" / f"{name}.md").read_text()
        assert f"[{package}]({name}.md)" in index


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d", out / "doctrees", DOCS, out]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_has_every_page_and_every_public_name(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists()
    everything = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for package in (
        "dpfast",
        "dpfast.clipping",
        "dpfast.data",
        "dpfast.diffusion",
        "dpfast.evaluation",
        "dpfast.privacy",
    ):
        for name in importlib.import_module(package).__all__:
            if name.isupper():
                continue  # a constant: its value is in the sources
            assert any(f'id="{home}.{name}"' in everything for home in (package, "dpfast")), (package, name)


def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    page = (site / "api" / "dpfast.html").read_text()
    assert "<strong>augmult</strong>: K, the rows made of each example." in page
    assert "<strong>Guarantee:</strong>" in page
    assert 'href="#dpfast.GhostClipper"' in page
    assert "system-message" not in page


DOCSTRING = """Sums of ``a * b``, |G_i| and *stars*. seed: known.

For example::

    total = f(x)

    more = f(y)

A formula:

    sum_i w_i G_i

sigma: noise; seed: of it; of
    ``Plan``, too. unknown: stays.
first, second: both.

Guarantee: it holds.

- one thing
- another
  that is longer

Raises:
    ValueError: where it does not.
"""

REST = r"""Sums of ``a * b``, \|G\_i\| and \*stars\*.

* **seed**: known.

For example:

.. code-block:: python

       total = f(x)

       more = f(y)

A formula:

.. code-block:: text

       sum_i w_i G_i

* **sigma**: noise.
* **seed**: of it; of :py:obj:`Plan <dpfast.Plan>`, too. unknown: stays.
* **first**, **second**: both.

**Guarantee:** it holds.

* one thing
* another that is longer

Raises:

* **ValueError**: where it does not.
"""


def test_docstrings_become_rest() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from docstrings import to_rest
    finally:
        sys.path.remove(str(DOCS))
    lines = to_rest(DOCSTRING.splitlines(), {"sigma", "seed", "first", "second"}, {"Plan": "dpfast.Plan"})
    assert re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) == REST
