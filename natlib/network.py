"""One network class for supernet and standalone use: stacked cells under a macro architecture."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import MacroConfig, Position
from natlib.operations import (
    BatchNorm,
    Conv,
    FactorizedReduction,
    build,
    cat,
    keep_freed_memory,
    pick,
    takes_relu,
)
from natlib.primitives import primitive
from natlib.transitions import edge_stride


def edge_keys(edges: Sequence[Edge]) -> list[str]:
    """Name each edge's weights: source, target, primitive, and a count where they repeat."""
    seen: dict[str, int] = {}
    keys = []
    for e in edges:
        key = f"{e.source}_{e.target}_{e.primitive}"
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}_{seen[key]}")
    return keys


class _InputLayer(nn.Module):
    """ReLU-conv-BN that brings a cell's input to its channels (factorized where it must shrink)."""

    def __init__(self, inputs: int, channels: int, halve: bool, shared: bool) -> None:
        super().__init__()
        self.reduction = FactorizedReduction(inputs, channels, shared) if halve else None
        self.conv = None if halve else Conv(inputs, channels)
        self.bn = None if halve else BatchNorm(channels, shared)

    def forward(self, relu: Tensor, columns: Tensor | None) -> Tensor:
        if self.reduction is not None:
            out: Tensor = self.reduction(relu, columns)
        else:
            assert self.conv is not None and self.bn is not None
            out = self.bn(F.conv2d(relu, pick(self.conv.weight, columns)))
        return out


MEMO_BYTES = 512 * 2**20


class _Value(NamedTuple):
    """A tensor, and the number of the expression that computes it."""

    number: int
    tensor: Tensor


class Memo:
    """Values that a network has computed on one batch of images, by the expression of each.

    Architectures on one batch that agree in a part of the network compute it once: rewritings of
    one input share much, any two share stem and input layers. Holds at most ``limit`` bytes, those
    of the earliest cells first, for they are met again most. Usable without gradients only, on one
    network with one state of its weights.
    """

    def __init__(self, limit: float = MEMO_BYTES) -> None:
        self.limit, self.depth, self.held = limit, 0, 0
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._values: list[OrderedDict[int, Tensor]] = []

    def take(self, compute: Callable[[], Tensor], *expression: Hashable) -> _Value:
        """Return the value of an expression, computing it where it is not held."""
        number = self._numbers.setdefault(expression, len(self._numbers))
        while len(self._values) <= self.depth:
            self._values.append(OrderedDict())
        own = self._values[self.depth]
        value = own.get(number)
        if value is None:
            value = own[number] = compute()
            self.held += value.numel() * value.element_size()
            while self.held > self.limit:
                _, dropped = next(v for v in reversed(self._values) if v).popitem(last=False)
                self.held -= dropped.numel() * dropped.element_size()
        else:
            own.move_to_end(number)
        return _Value(number, value)

    def forget(self) -> None:
        """Hold nothing."""
        self._values, self.held = [], 0

    def relu(self, value: _Value) -> _Value:
        """The ReLU of a value, taken once however many edges use it."""
        return self.take(partial(F.relu, value.tensor), "relu", value.number)


class _CellModule(nn.Module):
    """The weights of one cell; which of them a forward pass uses, its ``Cell`` says."""

    def __init__(
        self, place: Position, inputs: tuple[int, int], edges: Sequence[Edge], shared: bool
    ) -> None:
        super().__init__()
        self.place, self.shared = place, shared
        c = place.channels
        self.inputs = nn.ModuleList(
            _InputLayer(width, c, halve, shared)
            for width, halve in zip(inputs, (place.halve, False), strict=True)
        )
        self.edges = nn.ModuleDict()
        for key, e in zip(edge_keys(edges), edges, strict=True):
            module = build(primitive(e.primitive), c, edge_stride(e.source, place.kind), shared)
            if module is not None:
                self.edges[key] = module

    def forward(
        self,
        relus: tuple[_Value, _Value],
        columns: tuple[Tensor | None, Tensor | None],
        cell: Cell,
        memo: Memo,
    ) -> dict[int, _Value]:
        """Compute the cell's live nodes from the ReLUs of its two inputs."""
        live = cell.live
        values: dict[int, _Value] = {}
        for i, layer in enumerate(self.inputs):
            if i in live:
                compute = partial(layer, relus[i].tensor, columns[i])
                values[i] = memo.take(compute, layer, relus[i].number)
        for node, group in enumerate(cell.in_edges, INPUTS):
            if node not in live:
                continue
            total: _Value | None = None
            for key, e in zip(edge_keys(group), group, strict=True):
                if e.primitive == "null":
                    continue
                if self.shared:
                    key = f"{e.source}_{e.target}_{e.primitive}"
                term = self._edge(key, e, values[e.source], memo)
                if total is None:
                    total = term
                else:
                    add = partial(torch.add, total.tensor, term.tensor)
                    total = memo.take(add, "sum", total.number, term.number)
            values[node] = total or memo.take(partial(self._zero, relus[1].tensor), self, "zero")
        return values

    def _edge(self, key: str, e: Edge, source: _Value, memo: Memo) -> _Value:
        """The value of an edge that is not null."""
        if key not in self.edges:
            self._require(key, e)
            return source
        p, module = primitive(e.primitive), self.edges[key]
        if takes_relu(p):
            source = memo.relu(source)
        # Pools have no weights: those of one node are one.
        pool = p.kind in ("max_pool", "avg_pool")
        what: Hashable = (self, e.source < INPUTS, e.primitive) if pool else module
        return memo.take(partial(module, source.tensor), what, source.number)

    def _require(self, key: str, e: Edge) -> None:
        """Refuse an edge that this network holds no weights for (a stride-1 skip needs none)."""
        if e.primitive != "skip_connect" or edge_stride(e.source, self.place.kind) == 2:
            raise NatlibError(
                f"this network has no weights for edge {key}; a supernet takes the primitives and "
                "nodes it was built with, a standalone network its own genotype"
            )

    def _zero(self, like: Tensor) -> Tensor:
        """The value of a node all of whose incoming edges are null."""
        side = -(-like.shape[2] // 2) if self.place.kind == "reduce" else like.shape[2]
        shape = (like.shape[0], self.place.channels, side, side)
        return like.new_zeros(shape).contiguous(memory_format=torch.channels_last)


class CellNetwork(nn.Module):
    """Stem, stacked cells, global pooling, linear classifier; supernet or standalone.

    A supernet (``nodes`` and ``primitives`` given) holds every primitive on every possible edge
    and takes the genotype with each forward pass; a standalone network (``genotype`` given) holds
    its own edges only. Shared batch norms have no affine parameters and use batch statistics, as
    in the papers' supernet; ``shared`` may be set for a standalone network too, so that supernet
    weights can be copied in and give the same logits.

    Input (B, image_channels, H, W) float, output (B, classes). Weights are drawn from
    ``generator``, or from one of seed 0 (uniform Kaiming as PyTorch's layers). ``device``
    "meta" builds without memory. Input layers and classifier of a supernet hold columns for each
    of ``nodes`` nodes; a genotype's concat picks among them.
    """

    def __init__(
        self,
        macro: MacroConfig,
        *,
        genotype: Genotype | None = None,
        nodes: int | None = None,
        primitives: Sequence[str] | None = None,
        shared: bool | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        keep_freed_memory()
        if (genotype is None) == (nodes is None) or (nodes is None) != (primitives is None):
            raise NatlibError("give either a genotype, or nodes and primitives of a supernet")
        if genotype is None and not (nodes and nodes > 0 and primitives):
            raise NatlibError(
                f"{nodes} nodes and primitives {primitives}: a supernet needs one or more of each"
            )
        self.macro, self.genotype, self.nodes = macro, genotype, nodes
        self.shared = genotype is None if shared is None else shared
        edges: dict[str, Sequence[Edge]]
        if genotype is not None:
            edges = {name: cell.edges for name, cell in genotype.cells}
            outputs = {name: len(cell.concat) for name, cell in genotype.cells}
        else:
            assert nodes is not None and primitives is not None
            every = [
                Edge(s, t, primitive(p).name)
                for t in range(INPUTS, INPUTS + nodes)
                for s in range(t)
                for p in primitives
            ]
            edges = {"normal": every, "reduce": every}
            outputs = {"normal": nodes, "reduce": nodes}
        with torch.device("meta"):
            width = macro.stem * macro.channels
            self.stem = Conv(macro.image_channels, width, (3, 3))
            # Affine in the supernet too, as released: it has 15,024,550 parameters at 20 channels.
            self.stem_bn = BatchNorm(width, self.shared, affine=True)
            before = last = width
            cells = []
            for place in macro.positions():
                cells.append(_CellModule(place, (before, last), edges[place.kind], self.shared))
                before, last = last, place.channels * outputs[place.kind]
            self.cells = nn.ModuleList(cells)
            self.classifier = nn.Linear(last, macro.classes)
        self.to_empty(device=device)
        self.reset(generator)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew, in the modules' order, from a generator of seed 0 if None."""
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.reset()
        for name, weight in self.named_parameters():
            if weight.device.type == "meta":
                continue
            if weight.ndim > 1:
                bound = 1 / math.sqrt(weight[0].numel())
                weight.uniform_(-bound, bound, generator=generator)
            elif name == "classifier.bias":
                bound = 1 / math.sqrt(self.classifier.in_features)
                weight.uniform_(-bound, bound, generator=generator)

    def forward(
        self, images: Tensor, genotype: Genotype | None = None, memo: Memo | None = None
    ) -> Tensor:
        """Compute logits (B, classes); a supernet needs the genotype to run.

        ``memo`` keeps values for other genotypes on the same images; the logits are bitwise the
        same with and without. Raises NatlibError if a supernet gets none, or one with nodes or
        primitives it lacks.
        """
        run = genotype if genotype is not None else self.genotype
        if run is None:
            raise NatlibError("a supernet needs a genotype to run")
        self._require_nodes(run)
        # Values of a single genotype are of use within a cell only.
        kept = memo is not None
        memo = memo or Memo(math.inf)
        memo.depth = 0
        stem = memo.take(lambda: self.stem_bn(self.stem(images)), "stem")
        relus = (memo.relu(stem),) * 2
        columns: tuple[Tensor | None, Tensor | None] = (None, None)
        for i, module in enumerate(self.cells):
            assert isinstance(module, _CellModule)
            cell = run.reduce if module.place.kind == "reduce" else run.normal
            if not kept:
                memo.forget()
            memo.depth = i
            values = module(relus, columns, cell, memo)
            columns = (columns[1], self._columns(cell, module.place.channels, images.device))
            if module is not self.cells[-1]:
                # The next cells read the output through a ReLU: that of a concatenation is the
                # concatenation of the nodes' ReLUs, most of which the edges needed anyway.
                parts = [memo.relu(values[n]) for n in cell.concat]
                compute = partial(cat, [p.tensor for p in parts])
                numbers = tuple(p.number for p in parts)
                relus = (relus[1], memo.take(compute, "cat", cell.concat, numbers))
        pooled = torch.cat([values[n].tensor.mean((2, 3)) for n in cell.concat], 1)
        return F.linear(pooled, pick(self.classifier.weight, columns[1]), self.classifier.bias)

    def _require_nodes(self, genotype: Genotype) -> None:
        """Refuse a genotype with more nodes than this supernet has."""
        for name, cell in genotype.cells:
            if self.nodes is not None and cell.nodes > self.nodes:
                raise NatlibError(
                    f"the {name} cell has {cell.nodes} nodes; this supernet has {self.nodes}"
                )

    def _columns(self, cell: Cell, channels: int, device: torch.device) -> Tensor | None:
        """Input channels that a concat fills in the layers behind it; None if it fills all."""
        if self.nodes is None or cell.concat == tuple(range(INPUTS, INPUTS + self.nodes)):
            return None
        starts = torch.tensor([n - INPUTS for n in cell.concat], device=device) * channels
        return (starts[:, None] + torch.arange(channels, device=device)).flatten()

    @torch.no_grad()
    def copy_from(self, supernet: CellNetwork) -> None:
        """Copy a supernet's weights into this standalone network (built with ``shared=True``).

        Raises NatlibError unless this is a shared standalone network of the supernet's macro, with
        nodes and primitives that the supernet has.
        """
        run = self.genotype
        if run is None or not self.shared or supernet.nodes is None:
            raise NatlibError(
                "copy_from takes a supernet into a standalone network with shared batch norms"
            )
        if self.macro != supernet.macro:
            raise NatlibError(f"macro {self.macro} is not the supernet's {supernet.macro}")
        supernet._require_nodes(run)
        source = dict(supernet.named_parameters())
        columns: list[Tensor | None] = [None, None]
        for place in self.macro.positions():
            cell = run.reduce if place.kind == "reduce" else run.normal
            columns.append(supernet._columns(cell, place.channels, self.stem.weight.device))
        for name, weight in self.named_parameters():
            parts = name.split(".")
            if parts[0] == "cells" and parts[2] == "edges":
                # A repeated edge carries a count that the supernet's single copy lacks.
                pieces = parts[3].split("_")
                if pieces[-1].isdigit():
                    parts[3] = "_".join(pieces[:-1])
                if ".".join(parts) not in source:
                    raise NatlibError(f"the supernet has no weights for edge {parts[3]}")
                weight.copy_(source[".".join(parts)])
            elif parts[0] == "cells" and parts[2] == "inputs":
                weight.copy_(pick(source[name], columns[int(parts[1]) + int(parts[3])]))
            elif name == "classifier.weight":
                weight.copy_(pick(source[name], columns[-1]))
            else:
                weight.copy_(source[name])


def parameter_count(parameters: Iterable[Tensor]) -> int:
    """Count the elements of all given tensors."""
    return sum(p.numel() for p in parameters)
