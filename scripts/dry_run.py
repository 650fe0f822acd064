"""Say what a scale will cost before it starts: nothing is trained, no data is needed.

Each notebook's code runs on the parameters of experiments.yml with stand-ins for data and records:
a record that it asks for is not computed but estimated, its networks built at full size on the meta
device and counted. Where a stand-in result does not do, the statement is skipped.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import os
import signal
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("IPYTHONDIR", tempfile.mkdtemp(prefix="nat-"))

import torch
from experiments import SCALES, code_cells, exit_with, read_experiments, read_notebook, require
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import natlib
from natlib import data, estimate, imagenet, records, train, zoo
from natlib.ablation import LEARNERS
from natlib.files import write_json
from natlib.genotype import Genotype
from natlib.transitions import TITLES

SHAPES = {"cifar10": (10, 3), "cifar100": (100, 3), "fashion_mnist": (10, 1)}
SECONDS = 2
"""A statement that takes longer computes something itself, such as latencies: it is ended."""


class StandIn:
    """A result that nothing computed: any entry of it is another, as a number it is a half."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def __getitem__(self, name: Any) -> Any:
        if name == "genotype":
            return getattr(self.config, "genotype", zoo.get("DARTS")).to_json()
        return StandIn(self.config)

    def __iter__(self) -> Any:
        return iter(())

    def __float__(self) -> float:
        return 0.5


def other(genotype: Genotype, given: dict[Genotype, int]) -> dict[str, Any]:
    """Return a genotype of the same cost that is another, as JSON: edges of a node change places.

    ``given`` counts how many were made of each, so that rewritings of several seeds differ too.
    """
    number = given[genotype] = given.get(genotype, 0) + 1
    cells = []
    for _, cell in genotype.cells:
        edges: list[Any] = []
        for group in cell.in_edges:
            number, turned = divmod(number, 2)
            edges += group[::-1] if turned else group
        cells.append(replace(cell, edges=tuple(edges)))
    return Genotype(*cells).to_json()


def results(kind: str, config: Any, given: dict[Genotype, int]) -> Any:
    """Return a stand-in of what a record holds; what decides on further networks has its shape."""
    rules = [c.transitions for c, _ in getattr(config, "policies", ())]
    if kind == "derive":
        return {
            name: {rule: {"genotype": other(g, given), "changed": True} for rule in rules}
            for name, g in config.genotypes
        }
    if kind == "rewrite":
        methods = LEARNERS
        if hasattr(config, "policies"):
            nao = ("NAO",) * (config.nao is not None)
            methods = (*(TITLES.get(rule, rule) for rule in rules), *nao)
        return {m: {"genotype": other(config.genotype, given), "changed": True} for m in methods}
    return StandIn(config)


class Asked:
    """The records that notebooks asked for, each once: by notebook, kind and configuration."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str, Any]] = {}
        self.notebook = ""
        self.given: dict[Genotype, int] = {}
        self.results: dict[str, Any] = {}

    def many(
        self, store: Any, kind: str, configs: Sequence[Any], body: Any, **how: Any
    ) -> list[records.Record]:
        """Take the place of ``RunStore.run_many``."""
        how = {name: how.get(name) for name in ("recipe", "data", "inputs")}
        keys = [store.key(kind, config, **how) for config in configs]
        for key, config in zip(keys, configs, strict=True):
            self.found.setdefault(key, (self.notebook, kind, config))
            if key not in self.results:
                self.results[key] = results(kind, config, self.given)
        return [
            records.Record(
                kind, key, 1, records.as_json(config), "", {}, self.results[key], {}, {}, Path()
            )
            for key, config in zip(keys, configs, strict=True)
        ]

    def one(self, store: Any, kind: str, config: Any, body: Any, **how: Any) -> records.Record:
        """Take the place of ``RunStore.run``."""
        return self.many(store, kind, [config], body, **how)[0]


def split(config: train.DataConfig) -> train.Splits:
    """Take the place of ``train.splits``: images of the right shapes that hold nothing."""
    classes, channels = SHAPES[config.dataset]

    def part(number: int) -> train.Part:
        size = number, channels, config.image_size, config.image_size
        images = torch.empty(size, device="meta")
        return train.Part(images, torch.zeros(number, dtype=torch.long), images)

    parts = {name: part(getattr(config, name)) for name in ("train", "search", "report", "test")}
    zero = torch.zeros(channels)
    return train.Splits(**parts, classes=classes, channels=channels, mean=zero, std=zero + 1,
                        checksum=config.dataset, source="a dry run")  # fmt: skip


def images(name: str = "auto", split: str = "train") -> Any:
    """Take the place of ``data.load``: the name of a data set, its classes, no images."""
    name = "cifar10" if name == "auto" else name
    require(name, SHAPES, "data set")
    classes = tuple(map(str, range(SHAPES[name][0])))
    return types.SimpleNamespace(name=name, classes=classes, checksum=name, source="a dry run")


def faces() -> Any:
    """Take the place of ``data.load_faces``: labels and pairs of LFW's number, blank images."""
    labels = torch.arange(13_233) % 5_749
    blank = torch.zeros(1, dtype=torch.uint8).expand(13_233, 1, 112, 112)
    names = tuple(map(str, range(5_749)))
    found = types.SimpleNamespace(images=blank, labels=labels, classes=names, checksum="lfw")
    pairs = torch.arange(12_000).view(-1, 2) % 2_000
    fold = torch.arange(6_000) // 600
    return data.Faces(found, pairs, torch.arange(6_000) % 2 == 0, fold)  # type: ignore[arg-type]


def no_chart(*_: Any) -> None:
    """Take the place of ``drawing.start_chart``: end the statement that draws."""
    raise RuntimeError


def put_in_place(asked: Asked) -> None:
    """Put the stand-ins in the place of what reads data and computes records, in all of natlib."""
    real = train.splits
    folder = Path(str(natlib.__file__)).parent
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"natlib.{path.stem}")
        if getattr(module, "splits", None) is real:
            module.splits = split  # type: ignore[attr-defined]
        if hasattr(module, "start_chart"):
            module.start_chart = no_chart  # type: ignore[attr-defined]
    data.load, data.load_faces, data.imagenet_folder = images, faces, Path
    streamed = types.SimpleNamespace(checksum=lambda: "imagenet")
    imagenet.ImageNet = lambda *_: streamed  # type: ignore[assignment, misc]
    records.RunStore.run_many = lambda self, *a, **k: asked.many(self, *a, **k)  # type: ignore
    records.RunStore.run = lambda self, *a, **k: asked.one(self, *a, **k)  # type: ignore


def statements(notebook: Any, parameters: Mapping[str, Any]) -> list[str]:
    """Return a notebook's code, a statement a string, without those that only show something."""
    found = []
    for cell in code_cells(notebook):
        for node in ast.parse(cell.source).body:
            root = node.value if isinstance(node, ast.Expr) else None
            while isinstance(root, ast.Call | ast.Attribute):
                root = root.func if isinstance(root, ast.Call) else root.value
            if not (isinstance(root, ast.Name) and root.id in ("report", "display", "glue")):
                found.append(ast.unparse(node))
        if "parameters" in cell.metadata.get("tags", []):
            found += [f"{name} = {value!r}" for name, value in parameters.items()]
    return found


def too_long(*_: Any) -> None:
    """End a statement."""
    raise TimeoutError


def visit(shell: InteractiveShell, name: str, parameters: Mapping[str, Any]) -> None:
    """Run a notebook's statements one by one, going on behind one that fails."""
    shell.reset()  # type: ignore[no-untyped-call]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for code in statements(read_notebook(Path("notebooks") / f"{name}.ipynb"), parameters):
            signal.alarm(SECONDS)
            shell.run_cell(code, silent=True)  # type: ignore[no-untyped-call]
            signal.alarm(0)


def size(number: float) -> str:
    """Write bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB" if number < 1e3 else f"{number:,.0f} TB"


def table(scale: str) -> tuple[list[list[str]], estimate.Estimate, list[Any]]:
    """Return a row of text for each notebook, the total, and all configurations."""
    experiments = read_experiments()
    asked = Asked()
    put_in_place(asked)
    signal.signal(signal.SIGALRM, too_long)
    options = Config()
    options.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=options)
    shell.showtraceback = shell.showsyntaxerror = lambda *a, **k: None  # type: ignore
    rows, total = [], estimate.Estimate()
    for name, experiment in experiments.items():
        if scale not in experiment.parameters:
            continue
        asked.notebook = name
        given = {"scale": scale, "workers": 1, **experiment.parameters[scale]}
        visit(shell, name, given)
        own = estimate.Estimate()
        for notebook, kind, config in asked.found.values():
            if notebook == name:
                own += estimate.estimate(kind, config)
        rows.append([name, *cells(own)])
        total += own
    return [*rows, ["all", *cells(total)]], total, [c for _, _, c in asked.found.values()]


def cells(e: estimate.Estimate) -> list[str]:
    """Return the cells of an estimate's row."""
    if not e.networks and not e.unknown:
        return ["–"] * 5
    return [
        str(len(e.networks)),
        f"{e.trainings:,}",
        f"{e.hours:,.1f}" if e.hours >= 0.05 else "< 0.1",
        size(e.memory),
        size(e.disk),
    ]


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--json", type=Path, help="write the totals there too")
    arguments = parser.parse_args()
    require(arguments.scale, SCALES, "scale")
    rows, total, configs = table(arguments.scale)
    head = ["notebook", "networks", "trainings", "GPU-hours", "memory", "disk"]
    wide = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"estimate of scale {arguments.scale}, before anything runs")
    for row in [head, *rows]:
        print("  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]))
    whole = size(total.disk + estimate.data_bytes(configs))
    print(
        f"{len(total.networks)} networks, each cost built at full size without memory: params are"
    )
    print(f"  those of natlib.cost, for {len(total.published)} networks the printed ones too.")
    print("GPU-hours: MAdds x images x epochs x 3 (evaluations x 1) at the "
          f"{estimate.RATE / 1e9:,.0f} G MAdds/s of one V100")  # fmt: skip
    print("  (600 epochs of DARTS in about 24 h: issue 80 of quark0/darts); not measured here.")
    print("Memory: peak of one worker, weights, gradients, momentum, activations, images.")
    print(f"Disk: weights and checkpoints; with the data {whole}. A network that rewriting will")
    print("  choose is counted at the cost of its input: those of NAT and NAT++ may not exceed it,")
    print("  those of NAO may. Records are counted once, at the first notebook that asks for them.")
    if total.unknown:
        print(f"Not estimated: records of kind {', '.join(total.unknown)}.")
    if arguments.json:
        write_json(
            arguments.json, {"rows": rows, "madds": total.madds, "networks": len(total.networks)}
        )
    return 0


if __name__ == "__main__":
    exit_with(main)
