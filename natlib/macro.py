"""How cells are stacked into a network: pure data, shared by costs and networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from natlib.errors import NatlibError


@dataclass(frozen=True)
class Position:
    """One cell's place in a network.

    ``channels`` of its nodes, side ``size`` of its second input, whether it is a reduction cell
    (``kind`` "reduce") and whether its first input is still twice as large (``halve``).
    """

    kind: str
    channels: int
    size: int
    halve: bool


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

    def __post_init__(self) -> None:
        for name in ("channels", "cells", "classes", "image_size", "image_channels", "stem"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise NatlibError(f"{name} = {value!r}; it must be a whole number above 0")
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
        return tuple(sorted({self.cells // 3, 2 * self.cells // 3}))

    def positions(self) -> Iterator[Position]:
        """Yield each cell's place, first to last."""
        channels, size, halve = self.channels, self.image_size, False
        for i in range(self.cells):
            reduction = i in self.reductions
            if reduction:
                channels *= 2
            yield Position("reduce" if reduction else "normal", channels, size, halve)
            halve = reduction
            if reduction:
                size = -(-size // 2)
