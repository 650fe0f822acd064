"""The scripts that make runs: parameters, execution, dependencies, verification."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml

from natlib import NatlibError
from natlib.records import REPOSITORY, Record, RunStore
from natlib.sources import module_hash
from tests import record_bodies as bodies

SCRIPTS = REPOSITORY / "scripts"
PARAMETERS = """
scale: str = "smoke"
dataset: str = "auto"
workers: int = 1
seeds: int = 2
rate = 0.5
names: list[str] = ["a"]
genotype: str | None = None
"""


class Project:
    """A small repository: notebooks, experiments.yml, and the real scripts run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: dict[str, Any] = {}
        (root / "notebooks").mkdir()
        (root / ".make").mkdir()
        chosen = {"name": "cifar10", "checksums": ["1", "2"], "source": "a test", "folders": ["d"]}
        (root / ".make" / "dataset.json").write_text(json.dumps(chosen))

    def notebook(self, name: str, *cells: str, prose: str = "Prose.", **entry: Any) -> None:
        """Write a notebook with the usual parameters cell, and its entry in experiments.yml."""
        v4 = nbformat.v4
        tagged = v4.new_code_cell(PARAMETERS, id="p", metadata={"tags": ["parameters"]})
        code = [v4.new_code_cell(cell, id=f"c{n}") for n, cell in enumerate(cells)]
        text = v4.new_markdown_cell(prose, id="m")
        path = self.root / "notebooks" / f"{name}.ipynb"
        nbformat.write(v4.new_notebook(cells=[text, tagged, *code]), path)
        default = {"title": name, "after": [], "parameters": {"smoke": {}}}
        self.entries[name] = {**default, **entry}
        experiments = yaml.safe_dump(self.entries, sort_keys=False)
        (self.root / "experiments.yml").write_text(experiments)

    def command(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "NATLIB"))}
        return subprocess.run(
            arguments,
            cwd=self.root,
            env={**environment, "PYTHONPATH": str(REPOSITORY), **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def script(
        self, name: str, *arguments: str, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.command(sys.executable, str(SCRIPTS / f"{name}.py"), *arguments, **options)

    def run(self, name: str, *options: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.script("run_notebook", name, "--scale", "smoke", *options, **more)

    def make(self, *options: str) -> list[str]:
        """Do what `make reproduce` does short of the book; return the notebooks it executed."""
        # Without PYTHONPATH a kernel finds the project's own natlib before the installed one.
        graph = self.script("graph", "--scale", "smoke", *options, env={"PYTHONPATH": ""})
        assert graph.returncode == 0, graph.stderr
        done = self.command("make", "-f", ".make/graph.mk", "all", env={"PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        return [line.split()[0] for line in done.stdout.splitlines() if "started" in line]

    def executed(self, name: str) -> Any:
        return nbformat.read(self.root / "book" / "executed" / f"{name}.ipynb", as_version=4)

    def printed(self, name: str) -> str:
        outputs = [o for c in self.executed(name).cells for o in c.get("outputs", [])]
        return "".join(o.text for o in outputs if o.output_type == "stream")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# --- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seedz=3", "one has no parameter 'seedz'; it has: dataset, genotype, names, rate, scale,"),
        ("seeds=2.5", "one: parameter seeds = 2.5 must be int"),
        ("seeds=true", "one: parameter seeds = True must be int"),
        ("seeds='3'", "one: parameter seeds = '3' must be int"),
        ("rate=fast", "one: parameter rate = 'fast' must be float"),
        ("names=[1]", "one: parameter names = [1] must be list[str]"),
        ("genotype=1", "one: parameter genotype = 1 must be str | None"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(
    project: Project, setting: str, message: str
) -> None:
    project.notebook("one", "print('ran')")
    done = project.run("one", "--set", setting)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (project.root / "book").exists()


def test_parameters_reach_the_notebook(project: Project) -> None:
    project.notebook(
        "one",
        "print(scale, dataset, workers, seeds, rate, names, genotype)",
        parameters={"smoke": {"seeds": 5, "rate": 1, "genotype": "x.json"}},
    )
    done = project.run("one", "--workers", "3", "--set", "names=[b, c]")
    assert done.returncode == 0, done.stderr
    assert project.printed("one") == "smoke cifar10 3 5 1 ['b', 'c'] x.json\n"
    first, last = done.stdout.splitlines()
    assert (first, last[:12]) == ("one  started", "one  done in")
    metadata = project.executed("one").metadata
    assert "papermill" not in metadata
    assert {k: metadata["natlib"][k] for k in ("scale", "dataset")} == {
        "scale": "smoke", "dataset": "cifar10",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two"], "notebook: 'two' is not one of one"),
        (["one", "--scale", "big"], "scale: 'big' is not one of smoke, reduced, extended, paper"),
        (
            ["one", "--scale", "paper"],
            "scale of one in experiments.yml: 'paper' is not one of smoke",
        ),
    ],
)
def test_wrong_names_and_scales_are_refused(
    project: Project, arguments: list[str], message: str
) -> None:
    project.notebook("one")
    done = project.run(*arguments)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"after": ["two"]}, "experiments.yml: notebook that one comes after: 'two' is not one of"),
        ({"parameters": {"tiny": {}}}, "experiments.yml: scale of one: 'tiny' is not one of smoke"),
        ({"afterwards": []}, "experiments.yml: "),
        ({"files": ["none.csv"]}, "experiments.yml: none.csv, which one reads, is not there"),
        ({"parameters": {"smoke": {"seedz": 1}}}, "one has no parameter 'seedz'; it has: "),
        ({"parameters": {"smoke": None}}, "experiments.yml: parameters of one at scale smoke must"),
        (
            {"after": "two"},
            "experiments.yml: `after` of one must be a list, [] or [NAME, ...], not",
        ),
    ],
)
def test_mistakes_in_experiments_yml_are_named(
    project: Project, entry: dict[str, Any], message: str
) -> None:
    project.notebook("one", **entry)
    done = project.script("graph", "--scale", "smoke")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds: int = 2 * 4", "one: a parameter must be a plain value, not `2 * 4`"),
        ("seeds: int = (", "one: the parameters cell cannot be read: "),
        ("seeds: Optional[int] = 1", "one: parameter type Optional is not known; use bool, int,"),
    ],
)
def test_mistakes_in_the_parameters_cell_are_named(
    project: Project, line: str, message: str
) -> None:
    project.notebook("one", parameters={"smoke": {"seeds": 2}})
    cell = nbformat.v4.new_code_cell(line, metadata={"tags": ["parameters"]})
    path = project.root / "notebooks" / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    done = project.script("graph", "--scale", "smoke")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_notebook_without_this_scale_is_left_out_unless_it_is_asked_for(
    project: Project,
) -> None:
    project.notebook("one")
    project.notebook("two", parameters={"reduced": {}})
    done = project.script("graph", "--scale", "smoke")
    assert done.returncode == 0
    assert "left out: two has no parameters for scale smoke" in done.stdout
    done = project.script("graph", "--scale", "smoke", "two")
    assert done.stderr.startswith("error: scale of two in experiments.yml: 'smoke' is not one of")


def test_two_makes_keep_plans_of_their_own(project: Project) -> None:
    project.notebook("one")
    project.notebook("two")
    for name in ("one", "two"):
        project.script("graph", "--scale", "smoke", "--output", f".make/{name}.1", name)
    plans = [(project.root / ".make" / f"{name}.1.mk").read_text() for name in ("one", "two")]
    assert "two.ipynb" not in plans[0] and "one.ipynb" not in plans[1]


@pytest.mark.parametrize("tags", [[], [["parameters"], ["parameters"]]])
def test_a_notebook_has_one_parameters_cell(project: Project, tags: list[list[str]]) -> None:
    project.notebook("one")
    cells = [nbformat.v4.new_code_cell("seeds = 1", metadata={"tags": t}) for t in tags]
    path = project.root / "notebooks" / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    done = project.run("one")
    message = f"error: one: one cell must have the tag 'parameters', not {len(tags)}\n"
    assert (done.returncode, done.stderr) == (1, message)


# --- execution --------------------------------------------------------------------------------


def test_a_failing_cell_keeps_the_old_result_and_says_where(project: Project) -> None:
    project.notebook("one", "print('old')")
    assert project.run("one").returncode == 0
    project.notebook("one", "print('new')", "def f():\n    return 1 / 0\n\nf()")
    done = project.run("one")
    assert done.returncode == 1
    assert "error: one: in cell 5:" in done.stderr  # prose, parameters, those given, two of code
    assert "return 1 / 0" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "\x1b" not in done.stderr
    assert "papermill" not in done.stderr
    assert project.printed("one") == "old\n"
    assert "'new'" in (project.root / "runs" / "failed" / "one.ipynb").read_text()
    assert [p.name for p in (project.root / "book" / "executed").iterdir()] == ["one.ipynb"]


def test_of_bad_input_only_the_message_is_shown(project: Project) -> None:
    cell = "from natlib import NatlibError\nraise NatlibError('primitive x: allowed are y, z')"
    project.notebook("one", cell)
    done = project.run("one")
    assert done.returncode == 1
    message, where = done.stderr.splitlines()
    assert message == "error: one: primitive x: allowed are y, z"
    assert "runs/failed/one.ipynb" in where


def test_a_kernel_that_dies_is_one_clear_message(project: Project) -> None:
    project.notebook("one", "import os\nos._exit(1)")
    done = project.run("one")
    assert done.returncode == 1
    assert "error: one: the kernel ended" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_kernel_is_this_interpreter_whatever_is_installed(project: Project) -> None:
    project.notebook("one", "import os, sys\nprint(sys.executable, os.getcwd())")
    spec = project.root / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    wrong = {"argv": ["false"], "display_name": "Wrong", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(wrong))
    done = project.run("one", env={"JUPYTER_PATH": str(spec.parent.parent)})
    assert done.returncode == 0, done.stderr
    assert project.printed("one") == f"{sys.executable} {project.root}\n"


MANY = """
import os
from natlib.records import RunStore
from tests import record_bodies as bodies
configs = [bodies.Marked(os.getcwd(), seed, float(rate)) for seed in range(seeds)]
store = RunStore.default()
records = store.run_many("mark", configs, bodies.mark, recipe=1, data="", workers=workers)
print([record.result["resumed"] for record in records])
"""


def test_killed_in_the_middle_and_started_again(project: Project) -> None:
    project.notebook("one", MANY)
    command = [sys.executable, str(SCRIPTS / "run_notebook.py"), "one", "--scale", "smoke"]
    runs = project.root / "runs"
    environment = {**os.environ, "NATLIB_RUNS": str(runs), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*command, "--workers", "2", "--set", "rate=600"], cwd=project.root, env=environment
    )
    end = time.monotonic() + 120
    while len(list(runs.glob("mark/*/checkpoint.pt"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    process.wait()
    workers = [int(path.name.split("-")[1]) for path in project.root.glob("[01]-*")]
    assert len(workers) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (project.root / "book").exists()

    done = project.run("one", "--workers", "2", "--set", "rate=600", env={"NATLIB_RUNS": str(runs)})
    assert done.returncode == 0, done.stderr
    assert project.printed("one") == "[True, True]\n"
    used = json.loads((runs / "manifests" / "smoke" / "one.json").read_text())
    assert {entry["key"] for entry in used} == {p.parent.name for p in runs.glob("*/*/record.json")}


def test_the_run_ends_with_the_make_that_it_runs_under(project: Project) -> None:
    write = "open('reached', 'w').write(str(os.getpid()))"
    project.notebook("one", f"import os, time\n{write}\ntime.sleep(600)")
    make = subprocess.Popen(["sleep", "600"])
    command = [sys.executable, str(SCRIPTS / "run_notebook.py"), "one", "--scale", "smoke"]
    environment = {**os.environ, "NATLIB_MAKE": str(make.pid)}
    process = subprocess.Popen(command, cwd=project.root, env=environment)
    reached = project.root / "reached"
    while not (reached.exists() and reached.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    make.kill()
    make.wait()
    assert process.wait(timeout=60) == 1
    kernel = Path(f"/proc/{reached.read_text().strip()}")
    end = time.monotonic() + 60
    while kernel.exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_interrupt_stops_the_run_and_says_how_to_go_on(project: Project) -> None:
    project.notebook("one", "import time\nopen('reached', 'w')\ntime.sleep(600)")
    command = [sys.executable, str(SCRIPTS / "run_notebook.py"), "one", "--scale", "smoke"]
    process = subprocess.Popen(
        command, cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (project.root / "reached").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "one  started\none  stopped; type the same command again to go on\n"
    assert "Traceback" not in errors
    assert not (project.root / "book").exists()


# --- what runs again ----------------------------------------------------------------------------


def fake_natlib(root: Path, used: str, unused: str = "x = 1\n") -> None:
    folder = root / "natlib"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "used.py").write_text(used)
    (folder / "unused.py").write_text(unused)


def test_only_what_changed_runs_again(project: Project) -> None:
    source = 'def f():\n    """Say."""\n    return 1\n'
    fake_natlib(project.root, source)
    (project.root / "table.csv").write_text("a,b\n")
    first = "from natlib.used import f\nprint(f())"
    project.notebook("one", first)
    project.notebook("two", "print(2)", after=["one"])
    project.notebook("three", "print(3)", files=["table.csv"])
    assert project.make() == ["one", "two", "three"]
    assert project.make() == []

    # What does not matter: comments, docstrings, other modules, touches, prose, saved outputs.
    fake_natlib(project.root, f"# more\n{source.replace('Say', 'Tell')}", "x = 2\n")
    project.notebook("one", f"# a comment\n{first}")
    project.notebook("two", "print(2)", prose="Other prose.", after=["one"])
    for path in [*project.root.glob("natlib/*.py"), *project.root.glob("notebooks/*.ipynb")]:
        path.touch()
    copy = project.executed("three")
    nbformat.write(copy, project.root / "notebooks" / "three.ipynb")
    assert project.make() == []

    # What does: code that a notebook imports, its own code, parameters, files, a lost copy.
    fake_natlib(project.root, source.replace("1", "11"))
    assert project.make() == ["one", "two"]
    assert project.printed("one") == "11\n"
    project.notebook("two", "print(22)", after=["one"])
    assert project.make() == ["two"]
    project.notebook("two", "print(22)", after=["one"], parameters={"smoke": {"seeds": 3}})
    assert project.make() == ["two"]
    (project.root / "table.csv").write_text("a,b\n1,2\n")
    assert project.make() == ["three"]
    (project.root / "book" / "executed" / "one.ipynb").unlink()
    assert project.make("one") == ["one"]
    assert project.make("three") == []
    assert project.make("three", "--fresh") == ["three"]


def test_data_that_a_page_could_do_without_run_it_again_when_they_come(project: Project) -> None:
    fake_natlib(project.root, "x = 1\n")
    (project.root / "natlib" / "faces.py").write_text("x = 1\n")
    project.notebook("one", "from natlib.faces import x")
    project.notebook("two", "from natlib.used import x")
    assert project.make() == ["one", "two"]
    # Without them a page may show what is recorded, and what is recorded may change.
    recorded = project.root / "results" / "reference" / "smoke" / "records.json"
    recorded.parent.mkdir(parents=True)
    recorded.write_text("[]")
    assert project.make() == ["one"]
    (project.root / "d" / "lfw-a").mkdir(parents=True)
    assert project.make() == ["one"]
    recorded.write_text("[1]")
    assert project.make() == []


def test_computing_afresh_goes_on_from_the_same_moment_until_it_is_done(tmp_path: Path) -> None:
    # The real Makefile, with a Python that notes the moment and fails where it is told to.
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$NATLIB_FRESH" > moment\n'
        'while [ $# -gt 0 ]; do test "$1" = --output && touch "$2.imports"; shift; done\n'
        "test ! -e fails\n"
    )
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / ".make").mkdir()
    begun, fails = tmp_path / ".make" / "fresh.smoke", tmp_path / "fails"

    def make(target: str) -> tuple[int, str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "NATLIB"))}
        done = subprocess.run(
            ["make", target, "SCALE=smoke", "FRESH=1"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, (tmp_path / "moment").read_text().strip()

    fails.touch()
    status, said, moment = make("reproduce")
    assert status != 0 and "going on" not in said
    assert moment == begun.read_text().strip() and moment.isdigit()
    begun.write_text("12345\n")
    status, said, moment = make("reproduce")
    assert status != 0 and moment == "12345"
    assert "going on with FRESH=1 of " in said and "rm .make/fresh.smoke" in said
    fails.unlink()
    assert make("reproduce")[0::2] == (0, "12345")
    assert not begun.exists()
    # What runs no notebook does not begin anything.
    assert make("verify")[0] == 0 and not begun.exists()


def test_edited_prose_reaches_the_executed_copy_without_a_run(project: Project) -> None:
    project.notebook("one", "print(1)")
    assert project.make() == ["one"]
    target = project.root / "book" / "executed" / "one.ipynb"
    before = target.stat().st_mtime_ns
    project.notebook("one", "print(1)  # said so", prose="Better prose.")
    assert project.script("refresh").stdout == ""
    sources = [cell.source for cell in project.executed("one").cells]
    assert "Better prose." in sources
    assert "print(1)  # said so" in sources
    assert project.printed("one") == "1\n"
    assert target.stat().st_mtime_ns == before

    stamp = project.root / ".make" / "book.hash"
    made = stamp.stat().st_mtime_ns
    assert project.script("refresh").returncode == 0
    assert stamp.stat().st_mtime_ns == made
    project.notebook("one", "print(2)", prose="Newest prose.")
    assert "`make notebook NAME=one` renews it" in project.script("refresh").stdout
    assert "Better prose." in [cell.source for cell in project.executed("one").cells]


def test_a_page_of_its_own_reads_without_the_book(project: Project) -> None:
    glue = "from myst_nb import glue\nimport numpy as np\nglue('n', 3, display=False)\n"
    glue += "glue('gain', np.float64(1.25), display=False)\nglue('who', 'ours', display=False)"
    prose = (
        "{glue:text}`who` gains {glue:text}`gain:.1f` ({glue:text}`n:d` seeds) "
        "{cite:p}`guo2019nat`; see [the next](two.ipynb)."
    )
    project.notebook("one", glue, prose=prose)
    assert project.run("one").returncode == 0
    done = project.script("page", "book/executed/one.ipynb")
    assert done.returncode == 0, done.stderr
    page = (project.root / "book" / "executed" / "one.html").read_text()
    assert "<p>ours gains 1.2 (3 seeds); see the next.</p>" in page
    assert "import numpy" not in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="[^"#d]', page)  # loads nothing


def test_the_chosen_data_set_is_kept_until_what_is_searched_changes(project: Project) -> None:
    (project.root / "data" / "cifar-10-batches-py").mkdir(parents=True)
    chosen = project.root / ".make" / "dataset.json"
    answer = {"name": "cifar10", "checksums": ["1", "2"], "source": "a test", "request": "auto"}
    chosen.write_text(json.dumps({**answer, "folders": {"data": ["cifar-10-batches-py"]}}))
    done = project.script("dataset", "auto")
    assert (done.returncode, done.stdout) == (0, "data set: cifar10 (a test)\n")
    done = project.script("dataset", "auto", env={"NATLIB_DATA": "/nowhere"})
    assert (done.returncode, done.stderr) == (1, "error: NATLIB_DATA='/nowhere' is not a folder\n")
    done = project.script("dataset", "cifar11")
    assert done.returncode == 1
    assert "data set 'cifar11' is not one of 'auto', 'cifar10'" in done.stderr


# --- the Makefile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("SCALE=big", "SCALE=big is not one of: smoke reduced extended paper"),
        ("FRESH=yes", "FRESH=yes must be 0 or 1"),
    ],
)
def test_wrong_variables_are_refused(argument: str, message: str) -> None:
    command = ["make", "-C", str(REPOSITORY), "reproduce", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_help_is_the_default_and_lists_every_target() -> None:
    done = subprocess.run(["make", "-C", str(REPOSITORY)], capture_output=True, text=True)
    assert done.returncode == 0
    targets = (
        "reproduce test lint book verify reference restore transform bench notebook stale clean"
    )
    for target in [*targets.split(), "distclean", "help"]:
        assert f"\n  {target} " in done.stdout


# --- verify ---------------------------------------------------------------------------------------


class Verified:
    """Records of a random walk with a counterfeit reference to compare them with."""

    def __init__(self, root: Path) -> None:
        self.store = RunStore(root / "runs")
        configs = [bodies.Walk(seed) for seed in range(4)]
        arguments = {"recipe": 1, "data": ""}
        self.records = self.store.run_many("walk", configs, bodies.walk, workers=1, **arguments)
        self.records.append(self.store.run("fixed", bodies.Inner(), bodies.fixed, **arguments))
        entries = [{"kind": r.kind, "key": r.key} for r in self.records]
        path = root / "runs" / "manifests" / "smoke" / "one.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(entries))


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return scripts/verify.py as a module, in a repository of its own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    import verify

    return verify


def rewrite(root: Path, change: Any) -> None:
    path = root / "results" / "reference" / "smoke" / "records.json"
    path.write_text(json.dumps([change(record) for record in json.loads(path.read_text())]))


def test_verify_accepts_the_records_it_was_made_from(
    verifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Verified(tmp_path)
    assert verifier.record_reference("smoke") == 0
    assert verifier.verify("smoke") == 0
    out = capsys.readouterr().out
    assert "0 outside their tolerance" in out
    assert (tmp_path / "runs" / "verify" / "smoke.csv").read_text().count("\n") == 4 * 3 + 2 + 1


@pytest.mark.parametrize(
    ("kind", "metric", "factor", "status"),
    [("fixed", "params", 1.001, 1), ("walk", "end", 1.001, 0), ("walk", "end", 1e6, 1)],
)
def test_verify_allows_what_seeds_explain_and_no_more(
    verifier: Any, tmp_path: Path, kind: str, metric: str, factor: float, status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Verified(tmp_path)
    verifier.record_reference("smoke")

    def change(record: dict[str, Any]) -> dict[str, Any]:
        value = record["result"].get(metric)
        if record["kind"] == kind:
            many = isinstance(value, list)
            record["result"][metric] = [x * factor for x in value] if many else value * factor
        return record

    rewrite(tmp_path, change)
    assert verifier.verify("smoke") == status
    assert ("OUTSIDE" in capsys.readouterr().out) == bool(status)


def test_verify_finds_a_metric_that_is_gone_even_without_a_tolerance(verifier: Any) -> None:
    assert verifier.judge(0.5, 0.7, None) == "not judged"
    assert verifier.judge(0.5, verifier.MISSING, None) == "OUTSIDE"
    assert verifier.judge(0.5, verifier.MISSING, 1.0) == "OUTSIDE"


def test_verify_compares_the_changes_that_pages_show(
    verifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(name: str, rows: dict[str, dict[str, list[float]]]) -> Any:
        config = {"page": name, "scale": "smoke"}
        return SimpleNamespace(kind=verifier.PAGE, config=config, result={"rows": rows})

    def rows(learned: list[float]) -> dict[str, dict[str, list[float]]]:
        return {
            "original": {"top-1 (%)": [0.5, 0.6, 0.7]},
            "learned": {"change (points)": learned, "MAdds change (%)": [-0.5, -0.5, -0.6]},
            "random": {"change (points)": [0.0, 0.01, -0.01], "top-1 (%)": [0.5, 0.6, 0.7]},
            "nothing": {"change (points)": [0.0, 0.0, 0.0]},
        }

    reference = [page("one", rows([0.1, 0.11, 0.12])), page("two", rows([0.1, 0.11, 0.12]))]
    for learned, verdict in (
        ([0.12, 0.11, 0.1], "same"), ([0.11, 0.12, 0.13], "inside"), ([0.0, 0.01, -0.01], "OUTSIDE")
    ):  # fmt: skip
        found = verifier.page_rows(reference, [page("one", rows(learned))])
        by_name = {row[2]: row[-1] for row in found}
        assert by_name == {
            "learned: change (points)": verdict, "random: change (points)": "same",
            "nothing: change (points)": "same",
        }  # fmt: skip
    gone = verifier.page_rows(reference, [page("one", {})])
    assert {row[-1] for row in gone} == {"OUTSIDE"}
    assert not verifier.page_rows(reference, [])


def test_a_reference_is_not_recorded_while_records_are_gone(verifier: Any, tmp_path: Path) -> None:
    gone = Verified(tmp_path).records[0].path
    gone.unlink()
    with pytest.raises(
        NatlibError, match=r"one\.json names 1 records that are gone, such as .*run"
    ):
        verifier.record_reference("smoke")
    assert not (tmp_path / "results").exists()


def test_verify_says_what_is_missing(
    verifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Verified(tmp_path)
    verifier.record_reference("smoke")
    rewrite(tmp_path, lambda r: {**r, "key": "0" * 16} if r["kind"] == "fixed" else r)
    assert verifier.verify("smoke") == 0
    assert "missing on this machine: 1 of kind fixed" in capsys.readouterr().out
    rewrite(tmp_path, lambda r: {**r, "key": "0" * 16})
    assert verifier.verify("smoke") == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_tolerance_is_students_t_of_a_difference(verifier: Any) -> None:
    # Two groups of two, each with variance 2: pooled variance 2 at 2 degrees of freedom.
    assert verifier.tolerance([[1, 3], [11, 13]]) == pytest.approx(31.5991 * 2, rel=1e-4)
    assert verifier.tolerance([[1], [2]]) is None
    assert verifier.tolerance([[5, 5, 5]]) == 0


def test_counts_may_differ_as_any_two_of_them_do(verifier: Any) -> None:
    rarely = [[3, 3, 3, 3, 3, 3] for _ in range(20)] + [[3, 3, 3, 3, 3, 1]]
    assert verifier.tolerance(rarely) == 2
    halves = [[x / 2 for x in group] for group in rarely]
    assert verifier.tolerance(halves) < 1


def test_seeds_and_record_keys_do_not_part_configurations(verifier: Any) -> None:
    def config(seed: int, key: str) -> dict[str, Any]:
        return {"policy": [{"seed": seed, "rate": 0.1}, key], "key": key, "name": "x"}

    one, two = config(1, "0123456789abcdef"), config(2, "f123456789abcdef")
    assert verifier.without_seeds(one) == verifier.without_seeds(two)
    assert verifier.without_seeds(one)["policy"][0] == {"rate": 0.1}
    assert verifier.without_seeds({"name": "y"}) != verifier.without_seeds({"name": "x"})


def test_stale_lists_records_of_older_source(project: Project) -> None:
    record = Verified(project.root).records[0]
    text = record.path.read_text()

    def listed(body: str, source: str) -> str:
        content = json.loads(text)
        content["provenance"] |= {"body": body, "source": source}
        record.path.write_text(json.dumps(content))
        return project.script("stale").stdout

    assert "0 of 5 records" in listed("natlib.records:f", module_hash("natlib.records"))
    out = listed("natlib.records:f", "older")
    assert "1 of 5 records" in out
    assert f"walk  {record.key}  made " in out


def test_reference_holds_every_record_as_it_was_made(verifier: Any, tmp_path: Path) -> None:
    made = Verified(tmp_path).records
    verifier.record_reference("smoke")
    read: list[Record] = verifier.read_reference("smoke", tmp_path)
    assert {r.key for r in read} == {r.key for r in made}
    path = made[0].path
    assert all(replace(r, path=path) in [replace(m, path=path) for m in made] for r in read)


def test_reference_grows_page_by_page_and_is_gone_on_from(
    verifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Verified(tmp_path).records
    verifier.record_reference("smoke")
    # Another session: nothing is here, then one other page is executed.
    shutil.rmtree(tmp_path / "runs")
    store = RunStore(tmp_path / "runs")
    extra = store.run("fixed", bodies.Inner(2), bodies.fixed, recipe=1, data="")
    manifest = tmp_path / "runs" / "manifests" / "smoke" / "two.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps([{"kind": extra.kind, "key": extra.key}]))
    verifier.record_reference("smoke")
    assert f"{len(made)} of them from earlier" in capsys.readouterr().out
    keys = {r.key for r in verifier.read_reference("smoke", tmp_path)}
    assert keys == {extra.key, *(r.key for r in made)}
    assert verifier.restore("smoke") == 0
    assert f"{len(made)} of {len(made) + 1} records" in capsys.readouterr().out
    for record in made:
        assert store.find(record.kind, record.key) == record
    # The same page again replaces what was recorded of it.
    manifest.write_text(json.dumps([{"kind": made[0].kind, "key": made[0].key}]))
    verifier.record_reference("smoke")
    assert extra.key not in {r.key for r in verifier.read_reference("smoke", tmp_path)}


def test_what_a_page_recalled_stays_in_the_reference(verifier: Any, tmp_path: Path) -> None:
    made = Verified(tmp_path).records
    verifier.record_reference("smoke")
    # Another machine lacks the data of all but one record, and shows the others as recorded.
    manifest = tmp_path / "runs" / "manifests" / "smoke" / "one.json"
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([e | {"recalled": True} for e in entries[1:]] + entries[:1]))
    for record in made[1:]:
        shutil.rmtree(record.path.parent)
    assert verifier.verify("smoke") == 0
    verifier.record_reference("smoke")
    assert {r.key for r in verifier.read_reference("smoke", tmp_path)} == {r.key for r in made}
    pages = json.loads((tmp_path / "results/reference/smoke/pages.json").read_text())
    assert sorted(pages["one"]) == sorted(r.key for r in made)


def test_restoring_says_which_records_come_without_their_files(
    verifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Verified(tmp_path)
    verifier.record_reference("smoke")
    saved = {"end": {"path": "end.pt", "sha256": "0" * 64, "bytes": 1}}
    rewrite(tmp_path, lambda r: {**r, "artifacts": saved} if r["kind"] == "walk" else r)
    shutil.rmtree(tmp_path / "runs")
    verifier.restore("smoke")
    assert "4 are of supernets and policies and come without their weights" in (
        capsys.readouterr().out
    )
    walk = next(r for r in verifier.read_reference("smoke", tmp_path) if r.kind == "walk")
    found = RunStore(tmp_path / "runs").find("walk", walk.key)
    assert found is not None
    with pytest.raises(NatlibError, match=r"end\.pt is missing: delete .* and run again"):
        found.artifact("end")
    with pytest.raises(NatlibError, match="no reference of scale paper"):
        verifier.restore("paper")
