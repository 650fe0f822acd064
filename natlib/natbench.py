"""natbench: all architectures of a small complete space, trained from scratch; a table to ask.

    >>> from natlib import natbench
    >>> natbench.query(("sep_conv_3x3", "skip_connect", "max_pool_3x3")).validation

A cell has three nodes: its input 0, and 1 and 2, which sum their incoming edges 0→1, 0→2 and 1→2.
Each edge carries one of the 13 primitives of NAT++, node 2 is the output: 13³ = 2,197
architectures. This module reads the table and needs no torch; ``natlib.natbench_build`` makes it.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean

from natlib.errors import NatlibError
from natlib.files import read_json
from natlib.genotype import Cell, Edge, Genotype
from natlib.primitives import PRIMITIVES, primitive

EDGES = ((1, 2), (1, 3), (2, 3))
"""The edges 0→1, 0→2, 1→2 in natlib's numbering: input 0 is a cell's input 1, input 0 is unused."""

SIZE = len(PRIMITIVES) ** len(EDGES)
SEEDS = (0, 1)
FOLDER: Path = Path(__file__).resolve().parent.parent / "results" / "natbench"
RESULTS = ("validation", "test", "loss", "seconds", "machine")
COLUMNS = (
    "index", "edge_0_1", "edge_0_2", "edge_1_2", "trained_as", "params", "madds", "latency_ms",
    *(f"{name}_{seed}" for seed in SEEDS for name in RESULTS),
)  # fmt: skip


# The space ---------------------------------------------------------------------------------------


def primitives(index: int) -> tuple[str, str, str]:
    """Return the primitives of architecture ``index`` (0..2196), in the order of ``EDGES``.

    The index counts in base 13, the first edge being the most significant digit. Raises
    NatlibError outside the range.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < SIZE:
        raise NatlibError(f"there is no architecture {index!r}; allowed are 0..{SIZE - 1}")
    base = len(PRIMITIVES)
    first, rest = divmod(index, base**2)
    return PRIMITIVES[first], PRIMITIVES[rest // base], PRIMITIVES[rest % base]


def genotype(architecture: int | Sequence[str]) -> Genotype:
    """Return the genotype of an index or of three primitives (edges 0→1, 0→2, 1→2).

    Normal and reduction cell carry the same three: three choices then describe the whole network,
    and each edge from the input is met at both strides. Raises NatlibError as ``index`` does.
    """
    names = architecture if isinstance(architecture, int) else primitives(index(architecture))
    if isinstance(names, int):
        names = primitives(names)
    edges = tuple(Edge(s, t, name) for (s, t), name in zip(EDGES, names, strict=True))
    cell = Cell(edges, concat=(3,))
    return Genotype(cell, cell)


def index(architecture: Genotype | Sequence[str]) -> int:
    """Return the index of a genotype of this space, or of three primitives.

    Raises NatlibError on another number of primitives, a primitive outside the 13, and a genotype
    with other edges or with cells that differ.
    """
    if isinstance(architecture, Genotype):
        cell = architecture.normal
        ends = tuple((e.source, e.target) for e in cell.edges)
        if ends != EDGES or cell.concat != (3,) or architecture.reduce != cell:
            raise NatlibError(
                f"genotype {architecture.to_json()} is not in natbench: both cells must have the "
                f"edges {EDGES}, concat (3,), and the same primitives"
            )
        names: Sequence[str] = [e.primitive for e in cell.edges]
    else:
        names = architecture
    if isinstance(names, str) or len(names) != len(EDGES):
        raise NatlibError(f"{names!r} is no architecture: give three primitives")
    number = 0
    for name in names:
        if name not in PRIMITIVES:
            raise NatlibError(
                f"unknown primitive {name!r} in {tuple(names)}; allowed are {', '.join(PRIMITIVES)}"
            )
        number = number * len(PRIMITIVES) + PRIMITIVES.index(name)
    return number


def computation(names: Sequence[str]) -> tuple[str, ...]:
    """Return the terms whose sum a cell computes; equal for architectures that are one network.

    Terms are the primitives from the input to the output, chained with ``>``. Beyond what
    ``Genotype.fingerprint`` joins (dead parts behind null), this uses that on 1→2, which never
    changes the resolution, a skip is the identity; that node 1 is 0 where 0→1 is null; and that
    there pooling (batch norm without scale and shift) stays 0, while every convolution, its batch
    norm seeing a constant, is one learned shift per channel ("shift"), whatever its kernel: its
    weights get no gradient, and a separable convolution's first batch norm none through the ReLU.
    """
    first, direct, second = names
    terms = [direct]
    if first == "null":
        if primitive(second).kind in ("conv", "sep_conv", "dil_conv"):
            terms.append("shift")
    elif second == "skip_connect":
        terms.append(first)
    elif second != "null":
        terms.append(f"{first} > {second}")
    return tuple(sorted(term for term in terms if term != "null"))


@cache
def _representatives() -> tuple[int, ...]:
    """The lowest index with the same computation, for every index."""
    first: dict[tuple[str, ...], int] = {}
    return tuple(first.setdefault(computation(primitives(i)), i) for i in range(SIZE))


def trained_as(index: int) -> int:
    """Return the first architecture that computes the same: its trainings stand for ``index``.

    The same function of the same free weights has the same distribution of results, so one training
    a seed serves all; only the draw of the initial weights could tell them apart.
    """
    primitives(index)
    return _representatives()[index]


# The table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What the table holds of one architecture.

    ``seeds`` that are trained (none, one or both, while the table grows), and for each of them, in
    order: accuracy in 0..1 on ``validation`` images (which chose nothing during training) and on
    ``test`` images, training ``loss`` of the last epoch, ``seconds`` of one core for training and
    evaluation. ``params`` and ``madds`` are ``network_cost`` of this architecture, dead parts
    included. ``latency_ms``: median forward pass of one image on one core, None if not measured.
    """

    index: int
    primitives: tuple[str, str, str]
    trained_as: int
    params: int
    madds: int
    latency_ms: float | None
    seeds: tuple[int, ...]
    validation: tuple[float, ...]
    test: tuple[float, ...]
    loss: tuple[float, ...]
    seconds: tuple[float, ...]
    machines: tuple[str, ...]

    @property
    def mean_validation(self) -> float:
        """Validation accuracy, mean of the trained seeds."""
        return mean(self.validation)

    @property
    def mean_test(self) -> float:
        """Test accuracy, mean of the trained seeds."""
        return mean(self.test)


@dataclass(frozen=True)
class Table:
    """All 2,197 entries by index, and the ``card``: recipe, data, machines, dates, checksum."""

    entries: tuple[Entry, ...]
    card: dict[str, object]

    @property
    def trainings(self) -> int:
        """How many of ``SIZE`` × ``len(SEEDS)`` architecture-seed pairs the table holds."""
        return sum(len(e.seeds) for e in self.entries)

    @property
    def complete(self) -> bool:
        """Whether every architecture has every seed."""
        return all(len(e.seeds) == len(SEEDS) for e in self.entries)

    def query(self, architecture: Genotype | Sequence[str] | int) -> Entry:
        """Return the entry of an architecture; raises NatlibError if none of its seeds is there."""
        number = architecture if isinstance(architecture, int) else index(architecture)
        names = primitives(number)
        if not self.entries[number].seeds:
            raise NatlibError(
                f"architecture {number} {names} is not trained yet: the table holds "
                f"{self.trainings} of {SIZE * len(SEEDS)} trainings; "
                "`python -m natlib.natbench build` trains the rest"
            )
        return self.entries[number]


def load(folder: Path = FOLDER) -> Table:
    """Read and verify the table in ``folder`` (read again only when its files change).

    Raises NatlibError if a file is missing, or the table is not the one that its card describes.
    """
    try:
        stamps = [(folder / name).stat().st_mtime_ns for name in ("card.json", "table.csv")]
    except FileNotFoundError as error:
        raise NatlibError(
            f"there is no natbench table: {error.filename} is missing; check it out of the "
            "repository, or make it with `python -m natlib.natbench build`, then `export`"
        ) from None
    return _load(folder, *stamps)


@lru_cache(maxsize=4)
def _load(folder: Path, *stamps: int) -> Table:
    card = read_json(folder / "card.json")
    content = (folder / "table.csv").read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != card.get("sha256"):
        raise NatlibError(
            f"{folder / 'table.csv'} is corrupt: its SHA-256 is {found}, its card says "
            f"{card.get('sha256')}; check both files out of the repository again"
        )
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    try:
        entries = tuple(_entry(row) for row in rows)
        if [e.index for e in entries] != list(range(SIZE)):
            raise ValueError(f"{len(entries)} rows, not one for each of {SIZE} architectures")
    except (KeyError, ValueError) as error:
        raise NatlibError(f"{folder / 'table.csv'} is corrupt ({error!r})") from None
    return Table(entries, card)


def _entry(row: dict[str, str]) -> Entry:
    number = int(row["index"])
    names = primitives(number)
    if (row["edge_0_1"], row["edge_0_2"], row["edge_1_2"]) != names:
        raise ValueError(f"row {number} names other primitives than {names}")
    seeds = tuple(s for s in SEEDS if row[f"validation_{s}"])

    def column(name: str) -> tuple[float, ...]:
        return tuple(float(row[f"{name}_{s}"]) for s in seeds)

    return Entry(
        index=number,
        primitives=names,
        trained_as=int(row["trained_as"]),
        params=int(row["params"]),
        madds=int(row["madds"]),
        latency_ms=float(row["latency_ms"]) if row["latency_ms"] else None,
        seeds=seeds,
        validation=column("validation"),
        test=column("test"),
        loss=column("loss"),
        seconds=column("seconds"),
        machines=tuple(row[f"machine_{s}"] for s in seeds),
    )


def query(architecture: Genotype | Sequence[str] | int) -> Entry:
    """Return what the shipped table holds of a genotype, three primitives or an index.

    Raises NatlibError on an architecture outside the space or not trained yet, and on a table that
    is missing or corrupt.
    """
    return load().query(architecture)


if __name__ == "__main__":
    from natlib.natbench_build import main

    main()
