"""Turn one executed notebook into a web page without code, for readers outside the book.

The roles that only the book's builder knows are put in words: glued values as text, citations and
links between notebooks left out.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any

from experiments import exit_with, read_notebook, write_text
from nbconvert import HTMLExporter

RECORD = "application/papermill.record/text/plain"


def glued(notebook: Any) -> dict[str, Any]:
    """Return the values that the notebook glued, by name."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    values: dict[str, Any] = {}
    for output in outputs:
        if text := output.get("data", {}).get(RECORD):
            number = re.fullmatch(r"np\.\w+\((.*)\)", text)
            values[output.metadata.scrapbook.name] = ast.literal_eval(number[1] if number else text)
    return values


def in_words(text: str, values: dict[str, Any]) -> str:
    """Return a cell's prose without the book's roles."""

    def value(match: re.Match[str]) -> str:
        name, _, form = match[1].partition(":")
        return format(values[name], form)

    text = re.sub(r"\{glue:text\}`([^`]+)`", value, text)
    text = re.sub(r"\s*\{cite:\w+\}`[^`]+`", "", text)
    return re.sub(r"\[([^\]]+)\]\([^)]+\.ipynb\)", r"\1", text)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path, help="an executed notebook")
    source = parser.parse_args().notebook
    notebook = read_notebook(source)
    values = glued(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = in_words(cell.source, values)
        else:
            cell.outputs = [o for o in cell.outputs if RECORD not in o.get("data", {})]
    # MathJax and RequireJS would be loaded from the web, and nothing here needs them.
    exporter = HTMLExporter(
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        mathjax_url="",
        require_js_url="",
    )
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": source.stem}})
    target = source.with_suffix(".html")
    write_text(target, html)
    print(f"the report: {target.resolve()}")
    return 0


if __name__ == "__main__":
    exit_with(main)
