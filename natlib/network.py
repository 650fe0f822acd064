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

from natlib.allocation import allocate
from natlib.cost import layers_cost
from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import BlockMacro, Layer, Macro, MacroConfig, Position, Shape
from natlib.operations import (
    BatchNorm,
    Conv,
    DilatedDepthwise,
    FactorizedReduction,
    Pooling,
    build,
    cat,
    keep_freed_memory,
    pick,
    pointwise,
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


class _Bias(nn.Module):
    """What stands in the place of a batch norm in networks that have none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[:, None, None]


def _relu(macro: Macro) -> Callable[[Tensor], Tensor]:
    """The rectifier of a network: MobileNetV2's is cut off at 6."""
    inverted = isinstance(macro, BlockMacro) and macro.block == "inverted"
    return F.relu6 if inverted else F.relu


def _layers(
    layers: Iterable[Layer], channels: int, macro: Macro, shared: bool
) -> tuple[nn.Sequential, int]:
    """Build layers in a row on ``channels`` inputs; return them and their output channels."""
    modules: list[nn.Module] = []
    for layer in layers:
        k, stride = layer.kernel, layer.stride
        if layer.kind == "activation":
            modules.append(nn.ReLU6() if _relu(macro) is F.relu6 else nn.ReLU())
        elif layer.kind in ("max_pool", "avg_pool"):
            modules.append(Pooling(k[0], stride[0], layer.kind == "max_pool", layer.pad))
        else:
            outputs = layer.channels if layer.kind == "conv" else channels
            groups = 1 if layer.kind == "conv" else channels
            if layer.dilation > 1:
                modules.append(DilatedDepthwise(channels, k[0], stride[0]))
            else:
                modules.append(Conv(channels, outputs, k, stride, groups, layer.pad))
            channels = outputs
            if layer.norm:
                # Affine in the supernet too: only stems and heads have such layers there.
                modules.append(
                    BatchNorm(channels, shared, affine=True)
                    if macro.batch_norm
                    else _Bias(channels)
                )
    return nn.Sequential(*modules), channels


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
            out = self.bn(pointwise(relu, pick(self.conv.weight, columns)))
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

    def relu(self, value: _Value, function: Callable[[Tensor], Tensor] = F.relu) -> _Value:
        """The ReLU of a value, taken once however many edges use it; ``function`` computes it."""
        return self.take(partial(function, value.tensor), "relu", value.number)


class _CellModule(nn.Module):
    """The weights of one cell; which of them a forward pass uses, its ``Cell`` says."""

    def __init__(
        self,
        macro: Macro,
        place: Position,
        inputs: tuple[int, int],
        edges: Sequence[Edge],
        shared: bool,
    ) -> None:
        super().__init__()
        self.place, self.shared, self.function = place, shared, _relu(macro)
        c = place.channels
        # A block takes its inputs as they are.
        self.inputs = nn.ModuleList(
            _InputLayer(width, c, halve, shared)
            for width, halve in zip(inputs, (place.halve, False), strict=True)
            if place.block is None
        )
        self.edges = nn.ModuleDict()
        for key, e in zip(edge_keys(edges), edges, strict=True):
            p = primitive(e.primitive)
            if place.block is None:
                module = build(p, c, edge_stride(e.source, place.kind), shared)
            else:
                layers = place.block.layers(p, e.source, e.target)
                width = place.block.shape(e.source).channels
                module = _layers(layers, width, macro, shared)[0] if layers else None
            if module is not None:
                self.edges[key] = module

    def forward(
        self,
        inputs: tuple[_Value, _Value],
        columns: tuple[Tensor | None, Tensor | None],
        cell: Cell,
        memo: Memo,
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[int, _Value]:
        """Compute the cell's live nodes from the ReLUs of its two inputs, a block's from both.

        ``drop`` is applied to what each edge adds, save where that is a node's value itself.
        """
        live = cell.live
        values = {} if self.place.block is None else dict(enumerate(inputs))
        for i, layer in enumerate(self.inputs):
            if i in live:
                compute = partial(layer, inputs[i].tensor, columns[i])
                values[i] = memo.take(compute, layer, inputs[i].number)
        for node, group in enumerate(cell.in_edges, INPUTS):
            if node not in live:
                continue
            total: _Value | None = None
            for place, (key, e) in enumerate(zip(edge_keys(group), group, strict=True)):
                if e.primitive == "null":
                    continue
                if self.shared:
                    key = f"{e.source}_{e.target}_{e.primitive}"
                term = self._edge(key, e, values[e.source], memo)
                if drop is not None and key in self.edges:
                    # Numbered by its place in the cell: equal edges are dropped each for itself.
                    term = memo.take(partial(drop, term.tensor), self, "drop", node, place)
                if total is None:
                    total = term
                else:
                    add = partial(torch.add, total.tensor, term.tensor)
                    total = memo.take(add, "sum", total.number, term.number)
            if total is None:
                zero = partial(self._zero, inputs[1].tensor, node)
                total = memo.take(zero, self, "zero", self.place.block and node)
            values[node] = total
        return values

    def _edge(self, key: str, e: Edge, source: _Value, memo: Memo) -> _Value:
        """The value of an edge that is not null."""
        if key not in self.edges:
            self._require(key, e)
            return source
        p, module = primitive(e.primitive), self.edges[key]
        if takes_relu(p) and (self.place.block is None or e.source >= INPUTS):
            source = memo.relu(source, self.function)
        # Pools have no weights: those of one node are one, save in blocks, whose nodes differ.
        pool = self.place.block is None and p.kind in ("max_pool", "avg_pool")
        what: Hashable = (self, e.source < INPUTS, e.primitive) if pool else module
        return memo.take(partial(module, source.tensor), what, source.number)

    def _require(self, key: str, e: Edge) -> None:
        """Refuse an edge that this network holds no weights for (a stride-1 skip needs none)."""
        block = self.place.block
        if block is not None:
            identity = block.shape(e.source) == block.shape(e.target)
        else:
            identity = edge_stride(e.source, self.place.kind) == 1
        if e.primitive != "skip_connect" or not identity:
            raise NatlibError(
                f"this network has no weights for edge {key}; a supernet takes the primitives and "
                "nodes it was built with, a standalone network its own genotype"
            )

    def _zero(self, like: Tensor, node: int) -> Tensor:
        """The value of a node all of whose incoming edges are null."""
        side = -(-like.shape[2] // 2) if self.place.kind == "reduce" else like.shape[2]
        shape = (like.shape[0], self.place.channels, side, side)
        if self.place.block is not None:
            end = self.place.block.shape(node)
            shape = (like.shape[0], end.channels, end.size, end.size)
        return like.new_zeros(shape).contiguous(memory_format=torch.channels_last)


class CellNetwork(nn.Module):
    """Stem, stacked cells, head, linear classifier; supernet or standalone.

    A supernet (``nodes`` and ``primitives`` given) holds every primitive on every possible edge
    and takes the genotype with each forward pass; a standalone network (``genotype`` given) holds
    its own edges only. Shared batch norms have no affine parameters and use batch statistics, as
    in the papers' supernet; ``shared`` may be set for a standalone network too, so that supernet
    weights can be copied in and give the same logits.

    Input (B, image_channels, H, W) float, output (B, classes). Weights are drawn from
    ``generator``, or from one of seed 0 (uniform Kaiming as PyTorch's layers). ``device``
    "meta" builds without memory. Input layers and classifier of a supernet hold columns for each
    of ``nodes`` nodes; a genotype's concat picks among them.

    ``auxiliary`` adds DARTS's second classifier behind the last reduction cell, see
    ``with_auxiliary``. ``drop_path``, an attribute, is the probability with which what an edge adds
    is dropped for an image in training. Hand-crafted networks (``BlockMacro``) are standalone and
    neither shared nor with an auxiliary head.
    """

    def __init__(
        self,
        macro: Macro,
        *,
        genotype: Genotype | None = None,
        nodes: int | None = None,
        primitives: Sequence[str] | None = None,
        shared: bool | None = None,
        auxiliary: bool = False,
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
        self.drop_path = 0.0
        if isinstance(macro, BlockMacro):
            if genotype is None or self.shared:
                raise NatlibError(
                    "a hand-crafted network is standalone: give a genotype, and no shared batch "
                    "norms"
                )
            macro.require(genotype)
        self.auxiliary_behind: int | None = None
        if auxiliary:
            if genotype is None or isinstance(macro, BlockMacro):
                raise NatlibError("only a standalone DARTS-style network has an auxiliary head")
            self.auxiliary_behind = macro.reductions[-1]
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
            before, last = self._build_stem(macro)
            cells = []
            for i, place in enumerate(macro.positions()):
                own = edges[place.kind]
                cells.append(_CellModule(macro, place, (before, last), own, self.shared))
                before, last = last, place.channels * outputs[place.kind]
                if i == self.auxiliary_behind:
                    behind = Shape(last, place.size // 2)
            self.cells = nn.ModuleList(cells)
            self.hidden = nn.ModuleList()
            if isinstance(macro, BlockMacro):
                last = self._build_head(macro)
            self.classifier = nn.Linear(last, macro.classes)
            if self.auxiliary_behind is not None:
                self._build_auxiliary(macro, behind)
        allocate(self, device)
        self.reset(generator)
        self.to(memory_format=torch.channels_last)

    def _build_stem(self, macro: Macro) -> tuple[int, int]:
        """Build the layers before the cells; return the channels of the first cell's inputs."""
        if isinstance(macro, MacroConfig):
            width = macro.stem * macro.channels
            self.stem = Conv(macro.image_channels, width, (3, 3))
            # Affine in the supernet too, as released: it has 15,024,550 parameters at 20 channels.
            self.stem_bn = BatchNorm(width, self.shared, affine=True)
            return width, width
        self.stems = nn.ModuleList()
        widths = [macro.image_channels]
        for layers in macro.stems:
            stem, width = _layers(layers, widths[-1], macro, self.shared)
            self.stems.append(stem)
            widths.append(width)
        return widths[1], widths[-1]

    def _build_head(self, macro: BlockMacro) -> int:
        """Build the layers behind the blocks; return the inputs of the classifier."""
        start = macro.last
        self.head, last = _layers(macro.head, start.channels, macro, False)
        if macro.hidden:
            last *= layers_cost(macro.head, start)[1].size ** 2
        for width in macro.hidden:
            self.hidden.append(nn.Linear(last, width))
            last = width
        return last

    def _build_auxiliary(self, macro: Macro, start: Shape) -> None:
        """Build the second classifier on the output of the last reduction cell."""
        assert not isinstance(macro, BlockMacro)
        end = layers_cost(macro.auxiliary, start)[1]
        if end.size < 1:
            raise NatlibError(
                f"image_size = {macro.image_size}; an auxiliary head needs larger images"
            )
        self.auxiliary, width = _layers(macro.auxiliary, start.channels, macro, False)
        self.auxiliary_classifier = nn.Linear(width * end.size**2, macro.classes)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew, in the modules' order, from a generator of seed 0 if None."""
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.reset()
            elif isinstance(module, _Bias):
                module.weight.zero_()
        for name, weight in self.named_parameters():
            if weight.device.type == "meta":
                continue
            if weight.ndim > 1:
                bound = 1 / math.sqrt(weight[0].numel())
                weight.uniform_(-bound, bound, generator=generator)
            elif name.endswith(".bias"):
                layer = self.get_submodule(name.removesuffix(".bias"))
                if isinstance(layer, nn.Linear):
                    bound = 1 / math.sqrt(layer.in_features)
                    weight.uniform_(-bound, bound, generator=generator)

    def forward(
        self,
        images: Tensor,
        genotype: Genotype | None = None,
        memo: Memo | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute logits (B, classes); a supernet needs the genotype to run.

        ``memo`` keeps values for other genotypes on the same images; the logits are bitwise the
        same with and without. ``generator`` draws what ``drop_path`` drops. Raises NatlibError if a
        supernet gets no genotype, or one with nodes or primitives it lacks, and if paths are to be
        dropped without a generator, or with a memo.
        """
        return self._run(images, genotype, memo, generator, False)[0]

    def with_auxiliary(
        self,
        images: Tensor,
        genotype: Genotype | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of both classifiers, (B, classes) each; errors as in ``forward``."""
        if self.auxiliary_behind is None:
            raise NatlibError("this network was built without an auxiliary head")
        return self._run(images, genotype, None, generator, True)

    def _run(
        self,
        images: Tensor,
        genotype: Genotype | None,
        memo: Memo | None,
        generator: torch.Generator | None,
        auxiliary: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits and, if asked for, the auxiliary ones (else the logits again)."""
        run = genotype if genotype is not None else self.genotype
        if run is None:
            raise NatlibError("a supernet needs a genotype to run")
        self._require_nodes(run)
        drop = self._drop(generator)
        if drop is not None and memo is not None:
            raise NatlibError(f"drop_path = {self.drop_path} leaves nothing for a memo to keep")
        # Values of a single genotype are of use within a cell only.
        kept = memo is not None
        memo = memo or Memo(math.inf)
        memo.depth = 0
        inputs = self._stem(images, memo)
        columns: tuple[Tensor | None, Tensor | None] = (None, None)
        second = None
        for i, module in enumerate(self.cells):
            assert isinstance(module, _CellModule)
            cell = run.reduce if module.place.kind == "reduce" else run.normal
            if not kept:
                memo.forget()
            memo.depth = i
            values = module(inputs, columns, cell, memo, drop)
            if module.place.block is not None:
                inputs = (inputs[1], self._block_output(values[cell.concat[0]], memo))
                continue
            columns = (columns[1], self._columns(cell, module.place.channels, images.device))
            at_auxiliary = auxiliary and i == self.auxiliary_behind
            if at_auxiliary or module is not self.cells[-1]:
                # The next cells read the output through a ReLU: that of a concatenation is the
                # concatenation of the nodes' ReLUs, most of which the edges needed anyway.
                parts = [memo.relu(values[n]) for n in cell.concat]
                compute = partial(cat, [p.tensor for p in parts])
                numbers = tuple(p.number for p in parts)
                inputs = (inputs[1], memo.take(compute, "cat", cell.concat, numbers))
            if at_auxiliary:
                features = self.auxiliary(inputs[1].tensor).flatten(1)
                second = self.auxiliary_classifier(features)
        if isinstance(self.macro, BlockMacro):
            logits = self._classified(inputs[1].tensor)
        else:
            pooled = torch.cat([values[n].tensor.mean((2, 3)) for n in cell.concat], 1)
            weight = pick(self.classifier.weight, columns[1])
            logits = F.linear(pooled, weight, self.classifier.bias)
        return logits, logits if second is None else second

    def _stem(self, images: Tensor, memo: Memo) -> tuple[_Value, _Value]:
        """What the first cell reads: rectified for cells, as it is for blocks."""
        if isinstance(self.macro, MacroConfig):
            x = memo.relu(memo.take(lambda: self.stem_bn(self.stem(images)), "stem"))
            return x, x
        outputs = [memo.take(partial(self.stems[0], images), "stem")]
        for stem in self.stems[1:]:
            outputs.append(memo.take(partial(stem, outputs[-1].tensor), stem, outputs[-1].number))
        first, last = outputs[0], outputs[-1]
        if isinstance(self.macro, BlockMacro):
            return first, last
        return memo.relu(first), memo.relu(last)

    def _block_output(self, x: _Value, memo: Memo) -> _Value:
        """What a block hands on: rectified, save in inverted residuals."""
        assert isinstance(self.macro, BlockMacro)
        return x if self.macro.block == "inverted" else memo.relu(x)

    def _classified(self, x: Tensor) -> Tensor:
        """Head and classifier of a hand-crafted network."""
        x = self.head(x)
        x = x.flatten(1) if self.hidden else x.mean((2, 3))
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.classifier(x)
        return logits

    def _drop(self, generator: torch.Generator | None) -> Callable[[Tensor], Tensor] | None:
        """A function that drops its argument for some images and scales it up for the others."""
        if not self.training or self.drop_path == 0:
            return None
        if generator is None:
            raise NatlibError(f"drop_path = {self.drop_path} needs a generator in training")
        keep = 1 - self.drop_path

        def drop(x: Tensor) -> Tensor:
            kept = torch.rand(x.shape[0], 1, 1, 1, generator=generator) < keep
            return x * (kept.to(x.device, x.dtype) / keep)

        return drop

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
            columns.append(supernet._columns(cell, place.channels, self.classifier.weight.device))
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
