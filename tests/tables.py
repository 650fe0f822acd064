"""Made tables in place of NAS-Bench-201's and natbench's."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from natlib import natbench, tabular
from natlib.genotype import NASBENCH201
from natlib.nasbench201 import DATASETS, EDGES, FILE, SIZE
from natlib.primitives import PRIMITIVES


def nasbench201_columns() -> dict[str, list[object]]:
    """All cells in an order of their own, with accuracies and costs that are drawn."""
    draw = np.random.default_rng(5)
    cells = [
        "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|".format(*names)
        for names in itertools.product(NASBENCH201, repeat=len(EDGES))
    ]
    order = draw.permutation(SIZE)
    columns: dict[str, list[object]] = {"cellstr": [cells[i] for i in order]}
    columns["unique_str"] = columns["cellstr"]
    heavy = np.array([cells[i].count("conv_3x3") for i in order])
    for prefix in DATASETS.values():
        columns[f"{prefix}_params"] = (1000 + 500 * heavy).tolist()
        columns[f"{prefix}_flops"] = (9000 + 700 * heavy).tolist()
        columns[f"{prefix}_val_12ep"] = draw.uniform(10, 80, SIZE).tolist()
        columns[f"{prefix}_test_200ep"] = draw.uniform(10, 90, SIZE).tolist()
    columns["pi5_onnx_lat_ms"] = draw.uniform(1, 9, SIZE).tolist()
    return columns


def write_nasbench201(root: Path, columns: dict[str, list[object]]) -> Path:
    """Write a table where a user would put it."""
    (root / FILE).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), root / FILE)
    return root / FILE


def natbench_table(complete: bool = True) -> natbench.Table:
    """A natbench table of drawn accuracies: costs grow with the sum of the primitives' numbers."""
    draw = np.random.default_rng(6)
    entries = []
    for i in range(natbench.SIZE):
        names = natbench.primitives(i)
        cost = sum(len(PRIMITIVES) - PRIMITIVES.index(n) for n in names)
        seeds = (0, 1) if complete or i else (0,)
        a, b = (tuple(draw.uniform(0.1, 0.7, len(seeds)).tolist()) for _ in range(2))
        entries.append(
            natbench.Entry(i, names, natbench.trained_as(i), 10 * cost, 7 * cost, 1.0, seeds, a, b,
                           a, a, ("m",) * len(seeds))
        )  # fmt: skip
    return natbench.Table(tuple(entries), {"sha256": "made", "images": "made", "data": "made"})


def small_space(seed: int = 0) -> tabular.Space:
    """A space of two nodes, three edges and four primitives, in which dear edges are better.

    Edges from the input are met at both strides, as in natbench.
    """
    names = ("conv_3x3", "max_pool_3x3", "skip_connect", "null")
    draw = np.random.default_rng(seed)
    digits = np.array(list(itertools.product(range(4), repeat=3)))
    cost = (4.0 - digits).sum(1)
    validation = draw.uniform(0.1, 0.9, len(digits))
    return tabular.Space(
        "small", names, natbench.EDGES, ((1, 2), (1, 2), (1,)), validation,
        draw.uniform(0.1, 0.9, len(digits)), cost, 3 * cost, cost, np.arange(len(digits)) // 2,
        "made",
    )  # fmt: skip
