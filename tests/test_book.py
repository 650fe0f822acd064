"""The book builds from executed notebooks, offline, and refuses what a reader should not meet."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pandas as pd
import pytest
import yaml

from natlib import NatlibError, report, zoo
from natlib.records import REPOSITORY

V4 = nbformat.v4
GLUED = {"scale": "'smoke'", "dataset": "'CIFAR-10'", "claims_hold": "1", "claims_fail": "0",
         "claims_open": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/build_book.py as a module."""
    folder = REPOSITORY / "scripts"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("build_book", folder / "build_book.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def output(html: str, plain: str = "a table") -> Any:
    data = {"text/html": html, "text/plain": plain}
    return V4.new_output("execute_result", data, execution_count=1)


def glued(name: str, data: dict[str, str]) -> Any:
    prefix = "application/papermill.record/"
    about = {"scrapbook": {"mime_prefix": prefix, "name": name}}
    return V4.new_output(
        "display_data", {prefix + mime: text for mime, text in data.items()}, metadata=about
    )


def executed(path: Path, *outputs: Any, count: int | None = 1) -> None:
    """Write a notebook as if it had been executed, its one code cell with these outputs."""
    code = V4.new_code_cell("report.show()", outputs=list(outputs), execution_count=count)
    about = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    cells = [V4.new_markdown_cell(f"# Page {path.stem}\n\nProse with $x^2$."), code]
    nbformat.write(V4.new_notebook(cells=cells, metadata=about), path)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """The sources of the book, with stand-ins for the executed notebooks."""
    root = tmp_path / "book"
    ignored = shutil.ignore_patterns("_build", "executed", "__pycache__")
    shutil.copytree(REPOSITORY / "book", root, ignore=ignored)
    (root / "executed").mkdir()
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    chart = report.draw_genotype(zoo.get("DARTS"))._repr_mimebundle_()["text/html"]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            if chapter["file"].startswith("executed/"):
                executed(root / f"{chapter['file']}.ipynb", output(chart))
    claims = [report.Claim("A claim", "NAT++", "04_policy", True, "seen")]
    table = report.Table(report.scorecard(claims), stacked=True)._repr_html_()
    outputs = [glued(name, {"text/plain": text}) for name, text in GLUED.items()]
    outputs.append(glued("scorecard", {"text/html": table, "text/plain": "table"}))
    executed(root / "executed" / "90_scorecard.ipynb", output(table), *outputs)
    return root


def test_book_builds_offline_with_the_scorecard_in_front(script: ModuleType, book: Path) -> None:
    script.build(book)
    html = book / "_build" / "html"
    assert [path.name for path in (book / "_build").iterdir()] == ["html"]
    front = (html / "index.html").read_text()
    assert re.search(r"smoke</span></strong>\s*scale on", front)
    assert '<td data-label="claim">A claim</td>' in front
    assert 'href="executed/04_policy.html"' in front
    scorecard = (html / "executed" / "90_scorecard.html").read_text()
    assert 'href="04_policy.html"' in scorecard
    assert "node 2 adds sep_conv_3x3 of 0" in (html / "executed" / "05_transform.html").read_text()
    method = (html / "method.html").read_text()
    assert 'src="_static/mathjax/tex-svg.js' in method
    assert (html / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    assert "tex-svg.js" not in (html / "edit.html").read_text()
    index = (html / "searchindex.js").read_text()
    terms = json.loads(index[index.index("{") : index.rindex("}") + 1])["terms"]
    assert "bmsoftmax" in terms


def test_a_failed_build_leaves_the_old_book(script: ModuleType, book: Path) -> None:
    old = book / "_build" / "html" / "index.html"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    executed(book / "executed" / "90_scorecard.ipynb", output("<p>no glue</p>"))
    with pytest.raises(NatlibError, match="'scorecard' not found"):
        script.build(book)
    assert old.read_text() == "old"
    assert [path.name for path in (book / "_build").iterdir()] == ["html"]


def test_a_missing_notebook_is_named_with_the_remedy(script: ModuleType, book: Path) -> None:
    (book / "executed" / "04_policy.ipynb").unlink()
    with pytest.raises(NatlibError, match="not executed yet: 04_policy; run `make reproduce`"):
        script.build(book)


def test_a_missing_page_is_named(script: ModuleType, book: Path) -> None:
    (book / "edit.md").unlink()
    with pytest.raises(NatlibError, match="names pages that do not exist: edit"):
        script.build(book)


def test_notebooks_must_have_run_to_their_end(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    executed(path, count=None)
    with pytest.raises(NatlibError, match="cell 2 was not executed"):
        script.check_executed(path)
    executed(path, V4.new_output("error", ename="E", evalue="v", traceback=[]))
    with pytest.raises(NatlibError, match="cell 2 ended in an error"):
        script.check_executed(path)


GOOD = '<h1 id="top">x</h1><a href="#top">t</a><a href="https://example.org">out</a>'


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        (GOOD + '<img src="data:image/svg+xml;base64,AA==" alt="a curve">', ""),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<script src="//cdn.example/x.js"></script>', "loads //cdn.example/x.js"),
        ('<link rel="stylesheet" href="https://cdn.example/x.css">', "loads https"),
        ('<link rel="preconnect" href="https://fonts.example">', "loads https"),
        ('<img src="http://example.org/a.png" alt="a">', "loads http"),
        ("<style>@import 'https://cdn.example/x.css';</style>", "a style loads https"),
        ('<p style="background: url(https://cdn.example/x.png)">x</p>', "a style loads https"),
        ("<script>import('https://cdn.example/w.js')</script>", "a script loads https"),
        ('<img src="data:,x" alt="">', "no text alternative"),
        ('<img src="data:,x" alt="../_images/f.svg">', "no text alternative"),
        ('<a href="gone.html">x</a>', "dead link gone.html"),
        ('<a href="#gone">x</a>', "dead anchor #gone"),
    ],
)
def test_pages_are_checked(script: ModuleType, tmp_path: Path, html: str, fault: str) -> None:
    (tmp_path / "index.html").write_text(html)
    faults = script.check_pages(tmp_path)
    assert (len(faults) == 1 and fault in faults[0]) if fault else faults == []


def test_style_sheets_are_checked(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@font-face { src: url(https://fonts.example/a.woff2) }")
    assert script.check_pages(tmp_path) == ["x.css: loads https://fonts.example/a.woff2"]


def test_table_of_a_notebook_that_is_no_page_is_refused(script: ModuleType, book: Path) -> None:
    frame = pd.DataFrame({"notebook": ["99_nowhere"]})
    path = book / "executed" / "01_search_space.ipynb"
    executed(path, output(report.Table(frame)._repr_html_()))
    with pytest.raises(NatlibError, match="99_nowhere, which is no page"):
        script.build(book)
