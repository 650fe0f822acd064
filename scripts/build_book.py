"""Build the book from the executed notebooks and check that it reads without a network.

The pages are built apart, with warnings as errors, and checked; only then do they replace
book/_build/html. Nothing is executed and nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from experiments import exit_with, read_notebook

from natlib import NatlibError

# Attributes through which a page loads something; links that a reader may follow are no matter.
LOADS = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"),
    "audio": ("src",), "video": ("src", "poster"), "embed": ("src",), "object": ("data",),
    "image": ("href",), "use": ("href",),
}  # fmt: skip
LINKED = ("stylesheet", "icon", "shortcut icon", "preload", "prefetch", "modulepreload",
          "dns-prefetch", "preconnect", "manifest")  # fmt: skip
REMOTE = re.compile(r"^\s*(https?:)?//", re.I)
CSS_REMOTE = re.compile(r"""(?:url\(|@import)\s*['"]?((?:https?:)?//[^'")\s]+)""", re.I)
JS_REMOTE = re.compile(r"""(?:import\s*\(|from|\.src\s*=|=)\s*['"](https?://[^'"]+\.m?js)""")


def pages(book: Path) -> list[Path]:
    """Return the sources of all pages that the table of contents names, the front page first.

    Raises NatlibError where one is missing.
    """
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    found, missing = [], []
    for name in [toc["root"], *(chapter["file"] for chapter in chapters)]:
        files = [book / f"{name}{end}" for end in (".md", ".ipynb")]
        existing = [file for file in files if file.is_file()]
        found += existing
        if not existing:
            missing.append(name)
    notebooks = [Path(name).name for name in missing if name.startswith("executed/")]
    if notebooks:
        raise NatlibError(
            f"{book}: not executed yet: {', '.join(notebooks)}; run `make reproduce`, or "
            f"`make notebook NAME={notebooks[0]}` for one"
        )
    if missing:
        raise NatlibError(f"{book}/_toc.yml names pages that do not exist: {', '.join(missing)}")
    return found


def check_executed(path: Path) -> None:
    """Raise NatlibError where a notebook was not executed to its end or holds an error."""
    for number, cell in enumerate(read_notebook(path).cells, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            raise NatlibError(f"{path}: cell {number} ended in an error; run the notebook again")
        if cell.execution_count is None:
            raise NatlibError(f"{path}: cell {number} was not executed; run the notebook again")


class Page(HTMLParser):
    """What a page holds: its identifiers, the links to follow, and what it gets wrong."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.local: list[str] = []
        self.faults: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names, loads and links to."""
        attributes = {name: value or "" for name, value in attrs}
        self.inside = tag
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        loads = [attributes[name] for name in LOADS.get(tag, ()) if name in attributes]
        if tag == "link" and attributes.get("rel", "").lower() in LINKED:
            loads.append(attributes.get("href", ""))
        for url in loads:
            if REMOTE.match(url):
                self.faults.append(f"loads {url}")
            elif not url.startswith("data:"):
                self.local.append(url)
        self.check_css(attributes.get("style", ""))
        if tag == "a" and (url := attributes.get("href", "")):
            self.local.append(url)
        alternative = attributes.get("alt", "").strip()
        if tag == "img" and (not alternative or re.search(r"\.(svg|png|jpe?g|gif)$", alternative)):
            self.faults.append(
                f"an image has no text alternative: {attributes.get('src', '')[:60]}"
            )

    def handle_endtag(self, tag: str) -> None:
        """Leave a style or script."""
        self.inside = ""

    def handle_data(self, data: str) -> None:
        """Look for loads inside styles and scripts."""
        if self.inside == "style":
            self.check_css(data)
        if self.inside == "script":
            self.faults += [f"a script loads {url}" for url in JS_REMOTE.findall(data)]

    def check_css(self, text: str) -> None:
        """Note what a style sheet loads from the web."""
        self.faults += [f"a style loads {url}" for url in CSS_REMOTE.findall(text)]


def check_pages(html: Path) -> list[str]:
    """Return what is wrong with the built pages: loads from the web, dead links, silent images."""
    # Under _static stand templates of the theme, which are no pages.
    found = [path for path in html.rglob("*.html") if "_static" not in path.parts]
    parsed = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in found}
    faults = []
    for path, page in parsed.items():
        where = path.relative_to(html.resolve())
        faults += [f"{where}: {fault}" for fault in page.faults]
        for link in dict.fromkeys(page.local):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not link:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                faults.append(f"{where}: dead link {link}")
            elif parts.fragment and target in parsed:
                anchor = unquote(parts.fragment)
                if anchor not in parsed[target].ids:
                    faults.append(f"{where}: dead anchor {link}")
    for path in html.rglob("*.css"):
        css = path.read_text(encoding="utf-8")
        faults += [f"{path.relative_to(html)}: loads {url}" for url in CSS_REMOTE.findall(css)]
    return faults


def build(book: Path) -> None:
    """Build and check the pages, then put them at book/_build/html."""
    for path in pages(book):
        if path.suffix == ".ipynb":
            check_executed(path)
    work = book / "_build" / "new"
    shutil.rmtree(work, ignore_errors=True)  # what a killed build left
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    options = ["--path-output", str(work), "-W", "-n", "--keep-going", "-q"]
    try:
        # On python's own terms: no user's site packages, no bytecode beside the sources.
        done = subprocess.run(
            [*command, str(book), *options], text=True, capture_output=True, check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"},
        )  # fmt: skip
        if done.returncode != 0:
            said = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr.strip() or done.stdout)
            raise NatlibError(f"the book does not build:\n{said}")
        built = work / "_build" / "html"
        if faults := check_pages(built):
            raise NatlibError("the built pages have faults:\n" + "\n".join(sorted(faults)))
        html = book / "_build" / "html"
        if html.exists():
            html.rename(work / "old")
        built.rename(html)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--book", type=Path, default=Path("book"), help="default: book")
    build(parser.parse_args().book)
    return 0


if __name__ == "__main__":
    exit_with(main)
