"""Exact costs of cells and networks, by formula: no network is built, nothing is run."""

from __future__ import annotations

from functools import lru_cache

from natlib.genotype import Cell, Genotype
from natlib.macro import MacroConfig, Position
from natlib.primitives import Cost, Primitive, primitive
from natlib.transitions import edge_stride

__all__ = ["Cost", "cell_cost", "edge_cost", "network_cost"]


@lru_cache(maxsize=65536)
def edge_cost(p: Primitive, channels: int, size: int, stride: int) -> Cost:
    """Cost of one edge inside a network, on a ``size`` x ``size`` input.

    Params include affine batch norms, MAdds count convolutions only (the papers' network tables).
    """
    params = p.weights(channels, stride) + 2 * channels * p.batch_norms(stride)
    return Cost(params, p.conv_madds(channels, size, stride))


def cell_cost(cell: Cell, place: Position) -> Cost:
    """Cost of a cell's edges at one place of a network, without the cell's 1x1 input layers."""
    total = Cost()
    for e in cell.edges:
        stride = edge_stride(e.source, place.kind)
        size = -(-place.size // 2) if place.kind == "reduce" and stride == 1 else place.size
        total += edge_cost(primitive(e.primitive), place.channels, size, stride)
    return total


@lru_cache(maxsize=4096)
def _frame_cost(normal: int, reduce: int, macro: MacroConfig) -> Cost:
    """Cost of all but the edges, given the numbers of concatenated nodes."""
    width = macro.stem * macro.channels
    params = 9 * macro.image_channels * width + 2 * width
    madds = 9 * macro.image_channels * width * macro.image_size**2
    before, last = width, width
    for place in macro.positions():
        c = place.channels
        for inputs in (before, last):
            params += inputs * c + 2 * c
            madds += inputs * c * place.size**2
        before, last = last, c * (reduce if place.kind == "reduce" else normal)
    return Cost(params + last * macro.classes + macro.classes, madds + last * macro.classes)


def network_cost(genotype: Genotype, macro: MacroConfig) -> Cost:
    """Params and MAdds of the standalone network on one image.

    Params count everything trained from scratch (affine batch norms and the classifier's bias
    included), MAdds convolutions and the linear layer: the counting of the papers' tables.
    """
    total = _frame_cost(len(genotype.normal.concat), len(genotype.reduce.concat), macro)
    for place in macro.positions():
        cell = genotype.reduce if place.kind == "reduce" else genotype.normal
        total += cell_cost(cell, place)
    return total
