"""What experiments.yml and the notebooks say: shared by the scripts beside it.

All paths are relative to the current folder, the root of the repository.
"""

from __future__ import annotations

import ast
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
TYPES: dict[str, type] = {t.__name__: t for t in (bool, int, float, str, list, tuple, dict)}
"""What parameters may be."""


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
        if not isinstance(experiment.after, list):
            raise NatlibError(
                f"{path}: `after` of {name} must be a list, [] or [NAME, ...], not "
                f"{experiment.after!r}"
            )
        for scale, parameters in experiment.parameters.items():
            if not isinstance(parameters, dict):
                raise NatlibError(
                    f"{path}: parameters of {name} at scale {scale} must be a mapping, {{}} for "
                    f"none, not {parameters!r}"
                )
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


def declared_parameters(notebook: Any, name: str) -> dict[str, tuple[ast.expr | None, Any]]:
    """Return annotation and default of each parameter in the cell tagged ``parameters``."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NatlibError(f"{name}: one cell must have the tag 'parameters', not {len(cells)}")
    declared: dict[str, tuple[ast.expr | None, Any]] = {}
    try:
        nodes = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise NatlibError(f"{name}: the parameters cell cannot be read: {error}") from None
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=parameter)], value=value):
                declared[parameter] = (None, literal(value, name))
            case ast.AnnAssign(
                target=ast.Name(id=parameter), annotation=note, value=ast.expr() as value
            ):
                declared[parameter] = (note, literal(value, name))
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                raise NatlibError(
                    f"{name}: the parameters cell may only hold lines such as `seeds: int = 3`, "
                    f"not `{ast.unparse(node)}`"
                )
    return declared


def literal(value: ast.expr, name: str) -> Any:
    """Return the value of a literal; raise NatlibError on anything that is computed."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise NatlibError(
            f"{name}: a parameter must be a plain value, not `{ast.unparse(value)}`"
        ) from None


def fits(value: Any, annotation: ast.expr) -> bool:
    """Say whether ``value`` is of a type such as ``int``, ``list[str]`` or ``str | None``."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(value, left) or fits(value, right)
        case ast.Subscript(value=outer, slice=inner) if isinstance(value, list | tuple):
            return fits(value, outer) and all(fits(item, inner) for item in value)
        case ast.Subscript(value=outer):
            return fits(value, outer)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id=name) if name in TYPES:
            return isinstance(value, TYPES[name])
        case _:
            raise NatlibError(
                f"parameter type {ast.unparse(annotation)} is not known; use {', '.join(TYPES)}, "
                "list[int] and the like, or alternatives with |"
            )


def check_parameters(notebook: Any, parameters: dict[str, Any], name: str) -> None:
    """Raise NatlibError where a parameter is unknown to the notebook or of another type."""
    declared = declared_parameters(notebook, name)
    for parameter, value in parameters.items():
        if parameter not in declared:
            raise NatlibError(
                f"{name} has no parameter {parameter!r}; it has: {', '.join(sorted(declared))}"
            )
        annotation, default = declared[parameter]
        annotation = annotation or ast.Name(id=type(default).__name__)
        try:
            fit = fits(value, annotation)
        except NatlibError as error:
            raise NatlibError(f"{name}: {error}") from None
        if not fit:
            raise NatlibError(
                f"{name}: parameter {parameter} = {value!r} must be {ast.unparse(annotation)}"
            )


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
