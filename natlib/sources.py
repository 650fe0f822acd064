"""What code a result came from: hashes that change with the code and with nothing else.

Shared by records (the source hash in a record's provenance) and by the scripts that decide which
notebooks must run again. Only reads files: nothing is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@lru_cache(maxsize=256)
def normalised(source: str) -> str:
    """Return ``source`` without comments, docstrings and layout.

    Two sources that differ in nothing but these give the same text. Source that is not plain Python
    (a notebook cell with a magic command) is returned as it is.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


@lru_cache(maxsize=256)
def imported_names(source: str) -> frozenset[str]:
    """Return the dotted names of ``source``'s import statements, those inside functions too.

    ``from a import b`` gives both ``a`` and ``a.b``, since ``b`` may be a module.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _contents(package: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in package.glob("*") if p.is_file()}


LOADED = _contents(PACKAGE)
"""The package's files as they were when this process began, or the server that it was forked from:
what is edited later does not run here."""


def module_files(
    names: Iterable[str], package: Path = PACKAGE, contents: Mapping[Path, bytes] | None = None
) -> list[Path]:
    """Return the files of ``package`` that importing ``names`` brings in, transitively, sorted.

    A data file with a module's stem (``zoo.json`` beside ``zoo.py``) counts as part of it; names
    outside the package are left out. Files are those on disk, or those given.
    """
    if contents is None:
        contents = _contents(package)
    found: set[Path] = set()
    todo = list(names)
    while todo:
        parts = todo.pop().split(".")
        if parts[0] != package.name:
            continue
        files = [package / "__init__.py"]
        if len(parts) > 1:
            files.append(package / f"{parts[1]}.py")
        for file in files:
            if file in found or file not in contents:
                continue
            found.add(file)
            found.update(p for p in contents if p.stem == file.stem and p.suffix != ".py")
            todo.extend(imported_names(contents[file].decode("utf-8")))
    return sorted(found)


def files_hash(files: Iterable[Path], contents: Mapping[Path, bytes] | None = None) -> str:
    """Return a hash (16 hex digits) of the files' names and contents, Python sources normalised.

    Contents are those on disk, or those given.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        text = file.read_bytes() if contents is None else contents[file]
        if file.suffix == ".py":
            text = normalised(text.decode("utf-8")).encode()
        digest.update(f"{file.name}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def module_hash(name: str, package: Path = PACKAGE) -> str:
    """Return the hash of module ``name`` of ``package`` with all of the package that it imports."""
    return files_hash(module_files([name], package))


def loaded_hash(name: str) -> str:
    """Return ``module_hash`` of what this process runs, whatever is on disk by now."""
    return files_hash(module_files([name], contents=LOADED), LOADED)
