"""Sphinx extension of the book: MathJax from an installed package, links between notebooks."""

import re
import shutil
from importlib.metadata import files
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# Excerpts in search results are fetched from the pages, which browsers refuse on a file system.
NO_EXCERPTS = (
    "if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;"
)
MATHJAX = "tex-svg.js"  # draws formulas as SVG and so needs no font files


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy the one MathJax file that the book needs beside its pages."""
    if error or app.builder.format != "html":
        return
    found = [f for f in files("sphinx-mathjax-offline") or () if f.name == MATHJAX]
    target = Path(app.outdir, "_static", "mathjax")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(found[0].locate()), target / MATHJAX)


def link_notebooks(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Turn a table's links NAME.ipynb into links to the notebook's page, from any page."""

    def replace(match: re.Match[str]) -> str:
        name = f"executed/{match[1]}"
        if name not in app.env.all_docs:
            raise ValueError(f"{page} links to the notebook {match[1]}, which is no page")
        return f'href="{context["pathto"](name)}"'

    if "body" in context:
        context["body"] = re.sub(r'href="(\w+)\.ipynb"', replace, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    # Jupyter Book sets this for an extension that the book leaves out.
    app.add_config_value("comments_config", {}, "html")
    app.add_js_file(None, body=NO_EXCERPTS)
    app.connect("html-page-context", link_notebooks)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
