"""How cells are stacked into a network: pure data, shared by costs and networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Genotype
from natlib.primitives import Primitive


@dataclass(frozen=True)
class Layer:
    """A layer that no genotype changes: of a stem, of a head, or a part of a block's operation.

    ``kind`` is "conv" (to ``channels`` outputs), "depthwise", "max_pool", "avg_pool" or
    "activation". ``kernel`` and ``stride`` are (height, width); ``pad`` adds a border of half the
    kernel; ``norm`` says whether a batch norm follows a convolution.
    """

    kind: Literal["conv", "depthwise", "max_pool", "avg_pool", "activation"]
    channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: int = 1
    pad: bool = True
    norm: bool = True

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns added on each side."""
        if not self.pad:
            return (0, 0)
        return self.dilation * (self.kernel[0] // 2), self.dilation * (self.kernel[1] // 2)

    def out(self, side: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of the input."""
        if self.kind == "activation":
            return side
        height, width = (
            (n + 2 * p - self.dilation * (k - 1) - 1) // s + 1
            for n, p, k, s in zip(side, self.padding, self.kernel, self.stride, strict=True)
        )
        return height, width


ACTIVATION = Layer("activation")
"""A rectifier; MobileNetV2's is cut off at 6."""


def conv(channels: int, kernel: int, stride: int = 1, norm: bool = True) -> Layer:
    """A square convolution with padding."""
    return Layer("conv", channels, (kernel, kernel), (stride, stride), norm=norm)


def depthwise(kernel: int, stride: int = 1, norm: bool = True, dilation: int = 1) -> Layer:
    """A square depthwise convolution with padding."""
    return Layer("depthwise", 0, (kernel, kernel), (stride, stride), dilation, norm=norm)


def pool(kind: Literal["max_pool", "avg_pool"], kernel: int, stride: int, pad: bool) -> Layer:
    """A square pooling; averages leave the border out."""
    return Layer(kind, 0, (kernel, kernel), (stride, stride), pad=pad)


@dataclass(frozen=True)
class Shape:
    """Channels and side of a node's value."""

    channels: int
    size: int


@dataclass(frozen=True)
class Block:
    """What a cell is in a hand-crafted network: shapes of its nodes and how operations fit them.

    ``shapes`` of nodes 0, 1, 2, ...; the last holds for all further nodes. ``batch_norm`` False
    puts a bias in the place of each batch norm. See ``BlockMacro`` for ``kind``.
    """

    kind: str
    shapes: tuple[Shape, ...]
    batch_norm: bool

    def shape(self, node: int) -> Shape:
        """The shape of a node."""
        return self.shapes[min(node, len(self.shapes) - 1)]

    def layers(self, p: Primitive, source: int, target: int) -> tuple[Layer, ...]:
        """The layers of an operation from one node to another; none for null and identity.

        Operations stride and widen as their nodes' shapes demand. A skip that must do so is a 1x1
        convolution (the projection of ResNet), in VGG a 2x2 max pool where it only halves; pooling
        to other channels is followed by one, and no pooling by a batch norm of its own, as VGG's
        is not, though poolings of DARTS-style cells are. In inverted residuals a separable
        convolution is depthwise only, for the 1x1 convolutions around it are edges of their own.
        """
        start, end = self.shape(source), self.shape(target)
        stride, k, c = start.size // end.size, p.size, end.channels
        joins = () if start.channels == c else (conv(c, 1),)
        if p.kind == "null":
            return ()
        if p.kind == "skip":
            if stride == 1:
                return joins
            if self.kind == "convolution":
                return (pool("max_pool", stride, stride, False), *joins)
            return (conv(c, 1, stride),)
        if p.kind == "max_pool":
            return (pool("max_pool", k, stride, k % 2 == 1), *joins)
        if p.kind == "avg_pool":
            return (pool("avg_pool", k, stride, k % 2 == 1), *joins)
        if p.kind == "dil_conv":
            return (depthwise(k, stride, False, dilation=2), conv(c, 1))
        if p.kind == "sep_conv":
            if self.kind == "inverted":
                return (depthwise(k, stride), *joins)
            first = (depthwise(k, stride, False), conv(c, 1))
            return (*first, ACTIVATION, depthwise(k, 1, False), conv(c, 1))
        if p.factorized:
            # One axis is strided in each of the two, as in NAONet.
            one, two = (1, stride), (stride, 1)
            if p.kernel[0] > 1:
                one, two = two, one
            return (
                Layer("conv", c, p.kernel, one, norm=False),
                Layer("conv", c, p.kernel[::-1], two),
            )
        return (conv(c, k, stride),)


@dataclass(frozen=True)
class Position:
    """One cell's place in a network.

    ``channels`` of its nodes, side ``size`` of its second input, the name ``kind`` of the cell that
    stands there and whether the first input is still twice as large (``halve``). In a DARTS-style
    network a "reduce" cell halves, and ``block`` is None.
    """

    kind: str
    channels: int
    size: int
    halve: bool
    block: Block | None = None


def _require_whole(macro: object, *names: str) -> None:
    for name in names:
        value = getattr(macro, name)
        if not isinstance(value, int) or value < 1:
            raise NatlibError(f"{name} = {value!r}; it must be a whole number above 0")


def _thirds(cells: int) -> tuple[int, ...]:
    return tuple(sorted({cells // 3, 2 * cells // 3}))


def _cell_positions(
    cells: int, reductions: tuple[int, ...], channels: int, size: int, halve: bool
) -> Iterator[Position]:
    """Stack cells as DARTS does; ``halve`` says that the first cell's inputs differ in size."""
    for i in range(cells):
        reduction = i in reductions
        if reduction:
            channels *= 2
        yield Position("reduce" if reduction else "normal", channels, size, halve)
        halve = reduction
        if reduction:
            size = -(-size // 2)


@dataclass(frozen=True)
class MacroConfig:
    """A DARTS-style macro architecture: stem, stacked cells, global pooling, linear classifier.

    ``channels`` of the first cells' nodes, doubled at each reduction; reduction cells stand at 1/3
    and 2/3 of the depth; the stem is one 3x3 convolution to ``stem`` x channels. ``image_size`` in
    pixels. Raises NatlibError on values that no network can have. Source: DARTS, Sec. 3; NAT,
    Sec. 5.1.
    """

    channels: int = 20
    cells: int = 8
    classes: int = 10
    image_size: int = 32
    image_channels: int = 3
    stem: int = 3
    batch_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_whole(self, "channels", "cells", "classes", "image_size", "image_channels", "stem")
        if self.channels % 2:
            raise NatlibError(
                f"channels = {self.channels}; it must be even (a factorized "
                "reduction has two halves)"
            )
        if self.image_size % 4:
            raise NatlibError(
                f"image_size = {self.image_size}; two reductions need a multiple of 4"
            )

    @property
    def reductions(self) -> tuple[int, ...]:
        """Positions of the reduction cells, counted from 0."""
        return _thirds(self.cells)

    @property
    def stems(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers before the cells."""
        return ((conv(self.stem * self.channels, 3),),)

    @property
    def auxiliary(self) -> tuple[Layer, ...]:
        """The layers of the auxiliary head before its linear classifier (DARTS, Sec. A.2)."""
        return _auxiliary(stride=3, norm=True)

    def positions(self) -> Iterator[Position]:
        """Yield each cell's place, first to last."""
        return _cell_positions(self.cells, self.reductions, self.channels, self.image_size, False)


def _auxiliary(stride: int, norm: bool) -> tuple[Layer, ...]:
    last = Layer("conv", 768, (2, 2), pad=False, norm=norm)
    pooled = pool("avg_pool", 5, stride, False)
    return (ACTIVATION, pooled, conv(128, 1), ACTIVATION, last, ACTIVATION)


@dataclass(frozen=True)
class ImageNetMacro:
    """The DARTS-style macro architecture for ImageNet: a stem that halves the image three times.

    Fields and errors as in ``MacroConfig``; the first cell reads the stem at a quarter and at an
    eighth of the side. Source: DARTS, Sec. 3.3 and A.3; NAT, Sec. 5.1.
    """

    channels: int = 48
    cells: int = 14
    classes: int = 1000
    image_size: int = 224
    image_channels: int = 3
    batch_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_whole(self, "channels", "cells", "classes", "image_size", "image_channels")
        if self.channels % 2:
            raise NatlibError(f"channels = {self.channels}; it must be even (the stem halves it)")
        if self.image_size % 32:
            raise NatlibError(
                f"image_size = {self.image_size}; five reductions need a multiple of 32"
            )

    @property
    def reductions(self) -> tuple[int, ...]:
        """Positions of the reduction cells, counted from 0."""
        return _thirds(self.cells)

    @property
    def stems(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers before the cells: those of input 0, and what follows them for input 1."""
        c = self.channels
        return (conv(c // 2, 3, 2), ACTIVATION, conv(c, 3, 2)), (ACTIVATION, conv(c, 3, 2))

    @property
    def auxiliary(self) -> tuple[Layer, ...]:
        """The layers of the auxiliary head before its linear classifier.

        Its last convolution has no batch norm, as in the networks that DARTS reports.
        """
        return _auxiliary(stride=2, norm=False)

    def positions(self) -> Iterator[Position]:
        """Yield each cell's place, first to last."""
        size = self.image_size // 8
        return _cell_positions(self.cells, self.reductions, self.channels, size, True)


@dataclass(frozen=True)
class Stage:
    """Equal blocks in a row: ``blocks`` of ``channels`` outputs, the first with ``stride`` 1 or 2.

    ``expansion`` is how many times wider an inverted residual is inside than its input.
    """

    channels: int
    blocks: int
    stride: int = 1
    expansion: int = 1


BLOCKS = ("convolution", "basic", "bottleneck", "inverted")
"""The kinds of blocks, see ``BlockMacro``."""


@dataclass(frozen=True)
class BlockMacro:
    """A hand-crafted network whose blocks are cells: stem, stages of blocks, head, classifier.

    The ``block`` says what shapes the nodes have, so that the published genotypes fit:

    - "convolution" (VGG): node 2 has the input's channels and the block's size, all others the
      block's shape. A block is one layer and not a stage, for VGG16 has stages of two and of three
      layers, and so two cells do for it as for all other networks: ``normal``, and ``reduce`` for
      the layers behind a pooling, which is the skip from input 1 at stride 2.
    - "basic" (ResNet): node 2 has the input's shape, all others the block's.
    - "bottleneck" (ResNet) and "inverted" (MobileNetV2): nodes 2 and 3 have a fourth of the block's
      channels, or ``expansion`` times the input's; node 2 has the input's size.

    Operations rectify what they read from intermediate nodes but not the inputs, which come
    rectified, or, in "inverted" ones, are meant to be linear. Blocks of stride 2 are ``reduce``
    cells; so are those that widen at stride 1 where ``widen`` is "reduce". ``hidden`` are the
    widths of linear layers before the classifier, which then read the flattened image. Dropout is
    left out. A batch norm follows each convolution, or a bias where ``batch_norm`` is False.

    Raises NatlibError on values that no network can have. Sources: Simonyan and Zisserman, 2015;
    He et al., 2016; Sandler et al., 2018; NAT, Sec. 4.1.
    """

    block: str
    stages: tuple[Stage, ...]
    stem: tuple[Layer, ...]
    head: tuple[Layer, ...] = ()
    hidden: tuple[int, ...] = ()
    classes: int = 10
    image_size: int = 32
    image_channels: int = 3
    widen: str = "normal"
    batch_norm: bool = True

    def __post_init__(self) -> None:
        _require_whole(self, "classes", "image_size", "image_channels")
        if self.block not in BLOCKS:
            raise NatlibError(f"block {self.block!r} is not one of {', '.join(BLOCKS)}")
        if self.widen not in ("normal", "reduce"):
            raise NatlibError(f"widen = {self.widen!r}; it must be normal or reduce")
        if not self.stages:
            raise NatlibError("stages are empty; a network needs at least one")
        for stage in self.stages:
            _require_whole(stage, "channels", "blocks", "expansion")
            if stage.stride not in (1, 2):
                raise NatlibError(f"stride = {stage.stride!r} of a stage; it must be 1 or 2")
        layers = (layer.stride[0] for layer in (*self.stem, *self.head))
        factor = math.prod((*layers, *(stage.stride for stage in self.stages)))
        if self.image_size % factor:
            raise NatlibError(
                f"image_size = {self.image_size}; the strides of this network need a multiple of "
                f"{factor}"
            )

    @property
    def stems(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers before the blocks."""
        return (self.stem,)

    def positions(self) -> Iterator[Position]:
        """Yield each block's place, first to last."""
        side, c = (self.image_size, self.image_size), self.image_channels
        for layer in self.stem:
            side, c = layer.out(side), layer.channels or c
        before = last = Shape(c, side[0])
        for stage in self.stages:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                end = Shape(stage.channels, last.size // stride)
                widens = self.widen if last.channels != end.channels else "normal"
                kind = "reduce" if stride == 2 else widens
                shapes = (before, last, *self._inner(stage, last, end), end)
                block = Block(self.block, shapes, self.batch_norm)
                halve = before.size > last.size
                yield Position(kind, end.channels, last.size, halve, block)
                before, last = last, end

    @property
    def last(self) -> Shape:
        """The shape of the last block's output, which the head reads."""
        return [p.block for p in self.positions() if p.block is not None][-1].shapes[-1]

    def _inner(self, stage: Stage, start: Shape, end: Shape) -> tuple[Shape, ...]:
        """Shapes of the nodes that differ from the block's."""
        if self.block == "convolution":
            return (Shape(start.channels, end.size),)
        if self.block == "basic":
            return (start,)
        inverted = self.block == "inverted"
        width = stage.expansion * start.channels if inverted else end.channels // 4
        return Shape(width, start.size), Shape(width, end.size)

    def require(self, genotype: Genotype) -> None:
        """Raise NatlibError unless the genotype's cells put out one node of a block's shape."""
        last = self._last_inner
        for name, cell in genotype.cells:
            if len(cell.concat) != 1 or cell.concat[0] <= last:
                raise NatlibError(
                    f"the {name} cell puts out nodes {cell.concat}; a block of a hand-crafted "
                    f"network puts out one node above {last}"
                )

    @property
    def _last_inner(self) -> int:
        return INPUTS + (1 if self.block in ("bottleneck", "inverted") else 0)


Macro = MacroConfig | ImageNetMacro | BlockMacro
"""What networks and costs take: each has ``stems``, ``positions()``, ``batch_norm``, classes
and image."""
