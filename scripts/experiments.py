"""What experiments.yml and the notebooks say: shared by the scripts beside it.

All paths are relative to the current folder, the root of the repository.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

from natlib import NatlibError
from natlib.files import read_json, replacing
from natlib.sources import normalised

SCALES = ("smoke", "reduced", "extended", "paper")
EXECUTED = Path("book/executed")
STATE = Path(".make")
RUNS = Path(os.environ.get("NATLIB_RUNS") or "runs")


@dataclass(frozen=True)
class Experiment:
    """One notebook's entry in experiments.yml; its comment says what the fields mean."""

    title: str
    after: list[str]
    parameters: dict[str, dict[str, Any]]
    files: list[str] = field(default_factory=list)
    minutes: dict[str, float] = field(default_factory=dict)


def read_experiments(path: Path = Path("experiments.yml")) -> dict[str, Experiment]:
    """Return the experiments by name, in the order of the file.

    Raises NatlibError where the file is not as its comment says.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        experiments = {name: Experiment(**entry) for name, entry in content.items()}
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise NatlibError(f"{path}: {error}") from error
    seen: list[str] = []
    for name, experiment in experiments.items():
        for scale in {**experiment.minutes, **experiment.parameters}:
            require(scale, SCALES, f"{path}: scale of {name}")
        for upstream in experiment.after:
            require(upstream, seen, f"{path}: notebook that {name} comes after")
        seen.append(name)
    return experiments


def parameters_at(experiments: dict[str, Experiment], name: str, scale: str) -> dict[str, Any]:
    """Return the parameters of notebook ``name`` at ``scale``; raise NatlibError if it has none."""
    require(scale, SCALES, "scale")
    require(name, experiments, "notebook")
    require(scale, experiments[name].parameters, f"scale of {name} in experiments.yml")
    return experiments[name].parameters[scale]


def chosen_dataset() -> dict[str, Any]:
    """Return what scripts/dataset.py chose: name, checksums and source of the data set."""
    path = STATE / "dataset.json"
    if not path.exists():
        raise NatlibError(f"no data set is chosen yet ({path}): run scripts/dataset.py first")
    return read_json(path)


def require(value: str, allowed: Any, what: str) -> None:
    """Raise NatlibError where ``value`` is not among ``allowed``."""
    if value not in allowed:
        raise NatlibError(f"{what}: {value!r} is not one of {', '.join(allowed) or '(none)'}")


def read_notebook(path: Path) -> Any:
    """Return the notebook in ``path``; raise NatlibError where there is none or it is damaged."""
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise NatlibError(f"there is no notebook {path}") from None
    except (ValueError, nbformat.ValidationError) as error:
        raise NatlibError(f"{path} cannot be read: {error}") from error


def code_cells(notebook: Any) -> list[Any]:
    """Return the notebook's own code cells, without the one that papermill injects."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def code_of(notebook: Any) -> list[str]:
    """Return the sources of the code cells, without lines that are not Python (magics)."""
    return [re.sub(r"(?m)^\s*[%!].*$", "", cell.source) for cell in code_cells(notebook)]


def code_hash(notebook: Any) -> str:
    """Return a hash of the notebook's code: comments, prose and outputs do not change it."""
    cells = [normalised(cell.source) for cell in code_cells(notebook)]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all or nothing, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def exit_with(main: Callable[[], int]) -> None:
    """Run ``main`` and exit with its status; a NatlibError prints its one message."""
    try:
        sys.exit(main())
    except NatlibError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
