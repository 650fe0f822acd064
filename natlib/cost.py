"""Exact costs of cells and networks, by formula: no network is built, nothing is run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import BlockMacro, ImageNetMacro, Layer, Macro, MacroConfig, Position, Shape
from natlib.primitives import Cost, Primitive, primitive
from natlib.transitions import edge_stride

__all__ = ["Cost", "auxiliary_cost", "cell_cost", "edge_cost", "layers_cost", "network_cost"]


@lru_cache(maxsize=65536)
def edge_cost(p: Primitive, channels: int, size: int, stride: int) -> Cost:
    """Cost of one edge inside a network, on a ``size`` x ``size`` input.

    Params include affine batch norms, MAdds count convolutions only (the papers' network tables).
    """
    params = p.weights(channels, stride) + 2 * channels * p.batch_norms(stride)
    return Cost(params, p.conv_madds(channels, size, stride))


def layers_cost(
    layers: Iterable[Layer], start: Shape, batch_norm: bool = True
) -> tuple[Cost, Shape]:
    """Cost of layers in a row on an input of shape ``start``, and the shape of their output.

    Counted as ``edge_cost``; ``batch_norm`` False counts a bias in the place of each batch norm.
    """
    total, c, side = Cost(), start.channels, (start.size, start.size)
    for layer in layers:
        side = layer.out(side)
        if layer.kind in ("conv", "depthwise"):
            weights = layer.kernel[0] * layer.kernel[1] * c
            if layer.kind == "conv":
                c = layer.channels
                weights *= c
            norm = (2 if batch_norm else 1) * c if layer.norm else 0
            total += Cost(weights + norm, weights * side[0] * side[1])
    return total, Shape(c, side[0])


def cell_cost(cell: Cell, place: Position) -> Cost:
    """Cost of a cell's edges at one place of a network, without the cell's 1x1 input layers."""
    total = Cost()
    for e in cell.edges:
        total += _placed_cost(e, place)
    return total


def _placed_cost(e: Edge, place: Position) -> Cost:
    """Cost of one edge at one place."""
    p, block = primitive(e.primitive), place.block
    if block is not None:
        layers = block.layers(p, e.source, e.target)
        return layers_cost(layers, block.shape(e.source), block.batch_norm)[0]
    stride = edge_stride(e.source, place.kind)
    size = -(-place.size // 2) if place.kind == "reduce" and stride == 1 else place.size
    return edge_cost(p, place.channels, size, stride)


@lru_cache(maxsize=4096)
def _frame_cost(normal: int, reduce: int, macro: Macro) -> Cost:
    """Cost of all but the edges, given the numbers of concatenated nodes."""
    total, shape = Cost(), Shape(macro.image_channels, macro.image_size)
    widths = []
    for stem in macro.stems:
        cost, shape = layers_cost(stem, shape, macro.batch_norm)
        total += cost
        widths.append(shape.channels)
    before, last = widths[0], widths[-1]
    for place in macro.positions():
        if place.block is not None:
            continue
        c = place.channels
        for inputs in (before, last):
            total += Cost(inputs * c + 2 * c, inputs * c * place.size**2)
        before, last = last, c * (reduce if place.kind == "reduce" else normal)
    linear = [last, macro.classes]
    if isinstance(macro, BlockMacro):
        cost, shape = layers_cost(macro.head, macro.last, macro.batch_norm)
        total += cost
        flat = shape.channels * (shape.size**2 if macro.hidden else 1)
        linear = [flat, *macro.hidden, macro.classes]
    for inputs, outputs in pairwise(linear):
        total += Cost(inputs * outputs + outputs, inputs * outputs)
    return total


def network_cost(genotype: Genotype, macro: Macro) -> Cost:
    """Params and MAdds of the standalone network on one image.

    Params count everything that is built (affine batch norms and the classifier's bias included),
    MAdds convolutions and the linear layers: the counting of the papers' tables. Edges into nodes
    that nothing reads count too, though nothing computes them: see ``Genotype.pruned``. An
    auxiliary head is not counted, as in DARTS. Raises NatlibError if the genotype does not fit a
    hand-crafted network.
    """
    if isinstance(macro, BlockMacro):
        macro.require(genotype)
    total = _frame_cost(len(genotype.normal.concat), len(genotype.reduce.concat), macro)
    for place in macro.positions():
        cell = genotype.reduce if place.kind == "reduce" else genotype.normal
        total += cell_cost(cell, place)
    return total


def auxiliary_cost(genotype: Genotype, macro: MacroConfig | ImageNetMacro) -> Cost:
    """Params and MAdds of the auxiliary head alone, which stands behind the last reduction cell."""
    place = list(macro.positions())[macro.reductions[-1]]
    start = Shape(place.channels * len(genotype.reduce.concat), place.size // 2)
    cost, end = layers_cost(macro.auxiliary, start)
    inputs = end.channels * end.size**2
    return cost + Cost(inputs * macro.classes + macro.classes, inputs * macro.classes)
