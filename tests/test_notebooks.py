"""Every notebook at smoke scale through the real `make reproduce`, in a copy of the project."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = list(yaml.safe_load((REPOSITORY / "experiments.yml").read_text()))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files, with the environment and the data linked in."""
    installed = REPOSITORY / ".venv" / "installed"
    needed = [REPOSITORY / name for name in ("pyproject.toml", "constraints.txt")]
    # With an older one, make would install the copy into the project's own environment.
    if not installed.exists() or installed.stat().st_mtime < max(f.stat().st_mtime for f in needed):
        pytest.skip("needs the project's own .venv, up to date (make setup)")
    root = tmp_path_factory.mktemp("project")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    (root / ".venv").symlink_to(REPOSITORY / ".venv")
    (REPOSITORY / "data").mkdir(exist_ok=True)
    (root / "data").symlink_to(REPOSITORY / "data")
    return root


def reproduce(root: Path) -> subprocess.CompletedProcess[str]:
    """Run `make reproduce SCALE=smoke` there."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    for name in ("NATLIB_RUNS", "NATLIB_FRESH", "FRESH", "PYTHONPATH"):
        keep.pop(name, None)
    return subprocess.run(
        ["make", "reproduce", "SCALE=smoke"],
        cwd=root,
        env=keep,
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.fixture(scope="module")
def reproduced(copy: Path) -> Path:
    """The copy, reproduced once."""
    done = reproduce(copy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_executed_and_says_where_its_figures_come_from(
    reproduced: Path, name: str
) -> None:
    notebook = nbformat.read(reproduced / "book" / "executed" / f"{name}.ipynb", as_version=4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning reached the page"
    text = json.dumps(notebook)
    assert "Where these figures come from" in text
    page = reproduced / "book" / "_build" / "html" / "executed" / f"{name}.html"
    assert "natlib" in page.read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_committed_notebook_holds_no_outputs_and_no_definitions(name: str) -> None:
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not [c for c in code if c.outputs or c.execution_count is not None]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    trees = [ast.parse(c.source) for c in code]
    assert not [n for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    assert notebook.cells[0].cell_type == "markdown"
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1


def test_a_second_call_executes_nothing(reproduced: Path) -> None:
    pages = sorted((reproduced / "book").rglob("*.html")) + sorted(
        (reproduced / "book" / "executed").glob("*.ipynb")
    )
    before = {p: p.stat().st_mtime_ns for p in pages}
    done = reproduce(reproduced)
    assert done.returncode == 0, done.stderr
    assert "started" not in done.stdout
    assert {p: p.stat().st_mtime_ns for p in pages} == before


def test_the_book_is_whole_and_names_the_scale(reproduced: Path) -> None:
    front = (reproduced / "book" / "_build" / "html" / "index.html").read_text()
    assert "smoke" in front
    assert "holds" in front
    for name in NOTEBOOKS:
        assert f"executed/{name}.html" in front
