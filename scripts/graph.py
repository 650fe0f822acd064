"""Write what each executed notebook depends on, as a makefile with one hash file a notebook.

GNU Make then decides what runs. A hash file is rewritten only when its content changes: the code of
the notebook and of what it imports from natlib (comments, docstrings and outputs do not count), its
parameters, its data set, the files it reads, and which data it could do without are there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from experiments import (
    EXECUTED,
    STATE,
    Experiment,
    check_parameters,
    chosen_dataset,
    code_hash,
    code_of,
    exit_with,
    parameters_at,
    read_experiments,
    read_notebook,
    require,
    write_text,
)

from natlib import NatlibError
from natlib.sources import files_hash, imported_names, module_files

OPTIONAL = {
    "nasbench201": Path("nasbench201") / "nasbench201.parquet",
    "faces": Path("lfw-a"),
    "imagenet": Path("imagenet"),
}
"""By module: what it reads from the folders of data sets, and what pages do without."""


def there(files: list[Path], folders: list[str], scale: str) -> dict[str, str]:
    """Say of the optional data that ``files`` read where they are.

    Of what is nowhere, pages may show the recorded reference: then that is hashed too.
    """
    found = {}
    for file in files:
        if (wanted := OPTIONAL.get(file.stem)) and file.suffix == ".py":
            places = [f for f in folders if (Path(f) / wanted).exists()]
            recorded = Path("results") / "reference" / scale / "records.json"
            found[str(wanted)] = places[0] if places else files_hash([recorded] * recorded.exists())
    return found


def stamp(name: str, experiment: Experiment, parameters: dict[str, Any], folders: list[str]) -> str:
    """Return what decides whether the executed notebook ``name`` is still right, as JSON."""
    notebook = read_notebook(Path("notebooks") / f"{name}.ipynb")
    check_parameters(notebook, experiment.parameters[parameters["scale"]], name)
    imports = set().union(*map(imported_names, code_of(notebook)))
    files = [Path(file) for file in experiment.files]
    for file in files:
        if not file.is_file():
            raise NatlibError(f"experiments.yml: {file}, which {name} reads, is not there")
    modules = module_files(imports, Path("natlib").resolve())
    content = {
        "code": code_hash(notebook),
        "natlib": files_hash(modules),
        "there": there(modules, folders, parameters["scale"]),
        "files": files_hash(files),
        "parameters": parameters,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def needed_by(names: list[str], experiments: dict[str, Experiment]) -> list[str]:
    """Return ``names`` and the notebooks they come after, in the order of experiments.yml."""
    wanted = set(names)
    for name in reversed(experiments):
        if name in wanted:
            wanted.update(experiments[name].after)
    return [name for name in experiments if name in wanted]


def executed(names: list[str]) -> str:
    """Return the executed notebooks ``names`` as a list for Make."""
    return " ".join(str(EXECUTED / f"{name}.ipynb") for name in names)


def shared_imports(names: list[str]) -> list[str]:
    """Return what several of the notebooks that are to run import, with their runner's imports."""
    times: Counter[str] = Counter()
    for name in names:
        done, needs = EXECUTED / f"{name}.ipynb", STATE / f"{name}.hash"
        if not done.exists() or done.stat().st_mtime < needs.stat().st_mtime:
            notebook = read_notebook(Path("notebooks") / f"{name}.ipynb")
            times.update(set().union(*map(imported_names, code_of(notebook))))
    shared = sorted(module for module, n in times.items() if n > 1)
    # What trains needs torch._dynamo, which torch imports late and for longer than itself.
    trains = any(file.name == "train.py" for file in module_files(shared))
    late = ["torch._dynamo"] if trains else []
    return [*shared, *late, "papermill", "ipykernel.ipkernel"] if shared else []


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks (default: all), with what they need")
    parser.add_argument("--scale", required=True)
    parser.add_argument("--workers", type=int, help="worker processes in a notebook")
    parser.add_argument("--output", type=Path, default=STATE / "graph", help="without its ending")
    parser.add_argument("--fresh", action="store_true", help="run all of them again")
    arguments = parser.parse_args()
    scale = arguments.scale
    experiments = read_experiments()
    for name in arguments.names:
        require(name, experiments, "notebook")
    names = needed_by(arguments.names or list(experiments), experiments)
    if not arguments.names:
        for name in [name for name in names if scale not in experiments[name].parameters]:
            names.remove(name)
            print(f"left out: {name} has no parameters for scale {scale} in experiments.yml")
    dataset = chosen_dataset()
    given = {"scale": scale, "dataset": dataset["name"], "checksums": dataset["checksums"]}

    workers = ["--workers", str(arguments.workers)] if arguments.workers else []
    runner = str(Path(__file__).with_name("run_notebook.py"))
    options = ["--scale", scale, *workers]
    python = f"$${{NATLIB_PYTHON:-{shlex.quote(sys.executable)}}}"  # see warm.py
    first = [name for name in names if name not in arguments.names]
    rules = ["# written by scripts/graph.py", "all:", ".PHONY: all upstream"]
    rules += [f"all: {executed(names)}", f"upstream: {executed(first)}"]
    for name in names:
        experiment = experiments[name]
        own = parameters_at(experiments, name, scale)
        text = stamp(name, experiment, {**given, **own}, list(dataset["folders"]))
        file = STATE / f"{name}.hash"
        if arguments.fresh or not file.exists() or file.read_text() != text:
            write_text(file, text)
        rules.append(f"{executed([name])}: {file} {executed(experiment.after)}")
        rules.append(f"\t@{python} {shlex.join([runner, name, *options])}")
    write_text(Path(f"{arguments.output}.mk"), "\n".join(rules) + "\n")
    write_text(Path(f"{arguments.output}.imports"), " ".join(shared_imports(names)) + "\n")
    minutes = sum(experiments[name].minutes.get(scale, 0) for name in names)
    print(f"{len(names)} notebooks at scale {scale}", end="")
    about = f"{math.ceil(minutes)} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    print(f", about {about} in all on two cores if nothing is recorded yet" * (minutes > 0))
    return 0


if __name__ == "__main__":
    exit_with(main)
