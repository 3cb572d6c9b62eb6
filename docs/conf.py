"""The site: ``make docs`` writes it into ``docs/_build``. The pages are Markdown that reads well without it, too."""

import importlib.metadata
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import parameter_names, to_rest

project = "dpfast"
release = importlib.metadata.version("dpfast")
copyright = "the authors of dpfast"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dpfast {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
highlight_language = "none"  # what is Python, or a command, says so
pygments_style = "friendly"
pygments_dark_style = "monokai"
myst_heading_anchors = 3

# Packages that have a page in api/: what they say is public, under the shortest name it has.
PUBLIC = (
    "dpfast",
    "dpfast.clipping",
    "dpfast.data",
    "dpfast.diffusion",
    "dpfast.errors",
    "dpfast.evaluation",
    "dpfast.privacy",
    "dpfast.recipes",
    "dpfast.testing",
)

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autoclass_content = "both"  # of the class and of its __init__
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


TOP = frozenset(import_module("dpfast").__all__)


def _links() -> dict[str, str]:
    """Where a name in double backticks leads: classes by their name alone, all by their full name."""
    links = {}
    for package in PUBLIC:
        module = import_module(package)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == package]
        for name in getattr(module, "__all__", own):
            place = f"{'dpfast' if name in TOP else package}.{name}"
            links[f"{package}.{name}"] = place
            if name[0].isupper() and not name.isupper():
                links[name] = place
    return links


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rest(lines, parameter_names(obj), LINKS)


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Packages do not say again what ``dpfast`` says already."""
    return True if what == "module" and name in TOP and app.env.current_document.docname != "api/dpfast" else None


LINKS = _links()


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
