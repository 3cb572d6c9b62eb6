"""The snippets of Markdown pages, run as they stand there: ``python -W error snippets.py [--write] PAGE ...`` in any
environment that has dpfast.

Blocks marked ``python`` are run in order, in one namespace and one empty folder for each page. Commands
(``dpfast account ...``) in blocks marked ``sh`` are run where their output follows. A block marked ``text`` right after
either is what it prints, to the letter; ``--write`` puts it there.
"""

import contextlib
import difflib
import io
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n(?P<output>\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """line: of the page, on which ``code`` begins; output: what it is said to print, None where nothing is said;
    output_at: its place in the page.
    """

    language: str
    code: str
    line: int
    output: str | None
    output_at: tuple[int, int]


def snippets(page: str) -> Iterator[Snippet]:
    """Every block of a page that has a language."""
    for block in _BLOCK.finditer(page):
        line = page.count("\n", 0, block.start(2)) + 1
        if block[1] and block[1] != "text":
            yield Snippet(block[1], block[2], line, block[4], block.span(4))


def commands(code: str) -> list[str]:
    """The lines that call dpfast; without their comments, as the shell would see them."""
    words = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [shlex.join(line[1:]) for line in words if line and line[0].rpartition("/")[2] == "dpfast"]


def run_page(path: Path, folder: Path) -> list[tuple[Snippet, str]]:
    """Run a page's snippets in ``folder``; each with what it printed. Raises what one raises."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    done = []
    with contextlib.chdir(folder):
        for snippet in snippets(path.read_text()):
            if snippet.language == "python":
                done.append((snippet, _run_python(snippet, path, namespace)))
            elif snippet.language == "sh" and snippet.output is not None:
                done.append((snippet, _run_commands(snippet)))
    return done


def check_page(path: Path, folder: Path) -> int:
    """The same, and AssertionError where something else was printed than the page says; how many snippets there are."""
    done = run_page(path, folder)
    for snippet, said in done:
        if snippet.output not in (None, said):
            wrong = "\n".join(difflib.ndiff(snippet.output.splitlines(), said.splitlines()))
            raise AssertionError(f"{path.name}: what the snippet of line {snippet.line} prints has changed:\n{wrong}")
    return len(done)


def write_page(path: Path, folder: Path) -> int:
    """The same, with what was printed written into the page."""
    done, page = run_page(path, folder), path.read_text()
    for snippet, said in reversed(done):
        if snippet.output is not None:
            page = page[: snippet.output_at[0]] + said + page[snippet.output_at[1] :]
    path.write_text(page)
    return len(done)


def _run_python(snippet: Snippet, path: Path, namespace: dict[str, Any]) -> str:
    code = compile("\n" * (snippet.line - 1) + snippet.code, str(path), "exec")  # errors name the page's own line
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, namespace)
    return said.getvalue()


def _run_commands(snippet: Snippet) -> str:
    from dpfast.cli import app

    with contextlib.redirect_stdout(io.StringIO()) as said:
        for command in commands(snippet.code):
            app(shlex.split(command), standalone_mode=False)
    return said.getvalue()


def main(arguments: list[str]) -> None:
    import dpfast

    print(f"dpfast {Path(dpfast.__file__).parent}")
    do = write_page if "--write" in arguments else check_page
    for path in (Path(argument).resolve() for argument in arguments if argument != "--write"):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            count = do(path, Path(folder))
        print(f"{path.name}: {count} snippets in {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
