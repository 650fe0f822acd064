"""Bring edited prose into the executed notebooks, and note whether the book must be built again.

Text, comments and tags of a notebook may change without running it again: its executed copy gets
them here, as long as the code is the one that was executed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import nbformat
from experiments import (
    EXECUTED,
    STATE,
    code_cells,
    code_hash,
    exit_with,
    read_experiments,
    read_notebook,
    write_text,
)

BOOK = Path("book")
BESIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "scripts/build_book.py")


def refresh(name: str) -> str:
    """Bring the prose of notebook ``name`` up to date; return a warning where its code changed."""
    target = EXECUTED / f"{name}.ipynb"
    if not target.exists():
        return ""  # the builder of the book says so
    executed, source = read_notebook(target), read_notebook(Path("notebooks") / f"{name}.ipynb")
    about = executed.metadata.get("natlib", {})
    if about.get("code") != code_hash(source):
        return f"{name}: its page shows a run of older code; `make notebook NAME={name}` renews it"
    injected = [
        cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])
    ]
    cells = []
    outputs = iter(code_cells(executed))
    for cell in source.cells:
        if cell.cell_type == "code":
            done = next(outputs)
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", []):
            cells += injected
    executed.cells = cells
    text = nbformat.writes(executed)
    if text != target.read_text(encoding="utf-8"):
        times = target.stat()
        write_text(target, text)
        # Its results are as old as they were: notebooks that come after it need not run again.
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    return ""


def main() -> int:
    """Refresh all notebooks and write the book's hash file where something changed."""
    for warning in filter(None, map(refresh, read_experiments())):
        print(f"note: {warning}")
    files = [p for p in BOOK.rglob("*") if p.is_file() and "_build" not in p.parts]
    files += [Path(name) for name in BESIDE if Path(name).is_file()]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p}\n" for p in sorted(files)]
    stamp = STATE / "book.hash"
    if not stamp.exists() or stamp.read_text() != "".join(lines):
        write_text(stamp, "".join(lines))
    return 0


if __name__ == "__main__":
    exit_with(main)
