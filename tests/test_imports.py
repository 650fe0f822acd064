"""What importing natlib brings along, and rules that its source keeps."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import natlib
from natlib.sources import imported_names

PACKAGE = Path(natlib.__file__).parent
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
DRAW = {"report", "drawing", "speed"}
HEAVY = {"torchvision", "matplotlib", "seaborn", "pandas", "scipy", "PIL", "IPython", "myst_nb"}
DATA_ONLY = ["errors", "primitives", "genotype", "zoo", "transitions", "macro", "cost"]

LAYERS = [
    {"errors"},
    {"primitives"},
    {"genotype"},
    {"zoo", "transitions", "macro", "nasbench201"},
    {"cost", "operations", "tabular"},
    {"network", "policy", "baselines"},
    {"train"},
    {"search"},
    {"truth"},
    {"report"},
    {"evidence", "proxy"},
    {"compare"},
    {"ablation", "claims"},
]
LEAVES = {"data", "records"}


def loaded_after_each(names: list[str], watched: set[str]) -> dict[str, list[str]]:
    """Import modules one after the other in a fresh interpreter; what of ``watched`` came along."""
    code = (
        "import importlib, json, sys\n"
        "names, watched = json.loads(sys.argv[1])\n"
        "found = {}\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted(w for w in watched if w in sys.modules)\n"
        "print(json.dumps(found))\n"
    )
    request = json.dumps([names, sorted(watched)])
    done = subprocess.run(
        [sys.executable, "-c", code, request],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def test_importing_natlib_brings_nothing_that_only_pictures_or_downloads_need() -> None:
    # Modules that draw, or stand on one that does, are for notebooks.
    core = [m for m in MODULES if m not in DRAW and not own_imports(m) & DRAW]
    assert set().union(*LAYERS[:-4]) | LEAVES <= set(core)
    names = ["natlib", *(f"natlib.{m}" for m in core)]
    assert loaded_after_each(names, HEAVY) == {name: [] for name in names}


def test_genotypes_rules_and_costs_need_no_torch() -> None:
    names = ["natlib", *(f"natlib.{m}" for m in DATA_ONLY), "natlib.records"]
    assert loaded_after_each(names, {"torch", "numpy"}) == {name: [] for name in names}


def own_imports(module: str) -> set[str]:
    names = imported_names((PACKAGE / f"{module}.py").read_text())
    parts = {n.split(".")[1] for n in names if n.startswith("natlib.")}
    return parts & set(MODULES)


def test_imports_go_one_way() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert set(level) | LEAVES <= set(MODULES)
    for module, own in level.items():
        above = {m for m in own_imports(module) if level.get(m, -1) >= own}
        assert not above, f"natlib.{module} imports {above}"
    for leaf in LEAVES:
        assert not own_imports(leaf) & (set(level) - {"errors"})
    assert [m for m in MODULES if "report" in own_imports(m)] == [
        "ablation", "claims", "compare", "coverage", "evidence", "proxy"
    ]  # fmt: skip


DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal"}
IN_PLACE = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_seeds_or_draws_from_global_random_state(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
        given = {k.arg for k in node.keywords}
        where = f"{module}.py:{node.lineno}"
        if name in IN_PLACE or (of_torch and name in DRAWS):
            assert "generator" in given, where
        assert not (of_torch and name in ("manual_seed", "seed", "set_rng_state")), where
        assert not (isinstance(owner, ast.Name) and owner.id == "random"), where
        assert not (isinstance(owner, ast.Attribute) and owner.attr == "random"), where


@pytest.mark.parametrize("module", MODULES)
def test_no_module_evaluates_code_or_names_one_kind_of_device(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{module}.py:{node.lineno}"
            elif isinstance(node.func, ast.Attribute):
                assert node.func.attr != "cuda", f"{module}.py:{node.lineno}"
