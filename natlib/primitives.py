"""The operations an edge of a cell can carry, as data: names, order of cost, and cost formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from natlib.errors import NatlibError

# Cheaper kinds rank higher; max and avg pooling count as one kind (NAT++, Fig. 4).
RANKS = {
    "conv": 0,
    "sep_conv": 1,
    "dil_conv": 2,
    "max_pool": 3,
    "avg_pool": 3,
    "skip": 4,
    "null": 5,
}


@dataclass(frozen=True, order=True)
class Cost:
    """Parameters and multiply-adds of a primitive, a cell or a network on one image.

    ``params`` is a count; ``madds`` counts one multiplication with its addition as one (the
    papers' "MAdds"; many libraries call it MACs, and FLOPs is twice this number).
    """

    params: int = 0
    madds: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.madds + other.madds)

    def within(self, budget: Cost) -> bool:
        """Say whether neither params nor MAdds exceed those of ``budget``."""
        return self.params <= budget.params and self.madds <= budget.madds


@dataclass(frozen=True)
class Primitive:
    """An operation of the search space: a kind of operation and its kernel.

    ``kernel`` is (height, width); (0, 0) for skip_connect and null. ``factorized`` primitives are
    two one-dimensional convolutions in sequence, the first of shape ``kernel`` and the second of
    its transpose (NAONet). Definitions follow DARTS (Liu et al., 2019, Sec. 3.1).
    """

    name: str
    kind: str
    kernel: tuple[int, int]
    factorized: bool = False

    @property
    def rank(self) -> int:
        """Place of the kind in the order of cost, 0 = dearest (NAT++, Fig. 4)."""
        return RANKS[self.kind]

    @property
    def size(self) -> int:
        """The larger side of the kernel; 0 for skip_connect and null."""
        return max(self.kernel)

    @cached_property
    def _area(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def weights(self, channels: int, stride: int = 1) -> int:
        """Count convolution weights, ``channels`` in and out, without batch norm."""
        c = channels
        if self.kind == "conv":
            return (2 if self.factorized else 1) * self._area * c * c
        if self.kind == "sep_conv":
            return 2 * (self._area * c + c * c)
        if self.kind == "dil_conv":
            return self._area * c + c * c
        if self.kind == "skip" and stride == 2:
            # A factorized reduction: two 1x1 convolutions to half the channels each.
            return c * (c // 2) + c * (c - c // 2)
        return 0

    def batch_norms(self, stride: int = 1) -> int:
        """Count the affine batch norms over ``channels``: pooling's has none (as in DARTS)."""
        if self.kind == "sep_conv":
            return 2
        if self.kind in ("conv", "dil_conv") or (self.kind == "skip" and stride == 2):
            return 1
        return 0

    def conv_madds(self, channels: int, size: int, stride: int = 1) -> int:
        """Count multiply-adds of the convolutions only, on a ``size`` x ``size`` input.

        This is the counting of the papers' network tables (convolutions and linear layers).
        """
        out = -(-size // stride)
        if self.factorized:
            # The first convolution strides along one axis only, as in NAONet.
            return self._area * channels * channels * (size * out + out * out)
        return self.weights(channels, stride) * out * out

    def cost(self, channels: int, size: int, stride: int = 1) -> Cost:
        """Cost as in NAT++ Fig. 4: no batch norm, but pooling (k^2 CHW) and skip (CHW) counted."""
        out = -(-size // stride)
        if self.kind in ("max_pool", "avg_pool"):
            return Cost(0, self._area * channels * out * out)
        if self.kind == "skip" and stride == 1:
            return Cost(0, channels * out * out)
        return Cost(self.weights(channels, stride), self.conv_madds(channels, size, stride))


def _square(kind: str, k: int) -> Primitive:
    return Primitive(f"{kind}_{k}x{k}", kind, (k, k))


_KNOWN = (
    _square("max_pool", 3),
    _square("max_pool", 5),
    _square("avg_pool", 3),
    _square("avg_pool", 5),
    Primitive("skip_connect", "skip", (0, 0)),
    _square("sep_conv", 3),
    _square("sep_conv", 5),
    _square("dil_conv", 3),
    _square("dil_conv", 5),
    _square("conv", 1),
    _square("conv", 3),
    _square("conv", 5),
    Primitive("null", "null", (0, 0)),
    # Used by published genotypes (NAONet) but outside the 13 of NAT++.
    Primitive("conv_1x3_3x1", "conv", (1, 3), factorized=True),
    Primitive("conv_1x7_7x1", "conv", (1, 7), factorized=True),
    Primitive("conv_7x1_1x7", "conv", (7, 1), factorized=True),
    _square("avg_pool", 2),
    _square("max_pool", 2),
)
_BY_NAME = {p.name: p for p in _KNOWN}

ALL_PRIMITIVES: tuple[str, ...] = tuple(_BY_NAME)
"""Names of all primitives natlib can build."""

PRIMITIVES: tuple[str, ...] = (
    "max_pool_3x3", "max_pool_5x5", "avg_pool_3x3", "avg_pool_5x5", "skip_connect", "sep_conv_3x3",
    "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "conv_1x1", "conv_3x3", "conv_5x5", "null",
)  # fmt: skip
"""Names of the 13 primitives of NAT++, in the order of the authors' code."""

NAT_PRIMITIVES: tuple[str, ...] = (
    "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
    "dil_conv_3x3", "dil_conv_5x5", "conv_3x3", "null",
)  # fmt: skip
"""Names of the nine primitives of NAT's fully-concat space (NeurIPS 2019)."""

ENAS_PRIMITIVES: tuple[str, ...] = (
    "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3",
)  # fmt: skip
"""Names of the five primitives of ENAS's cells (Pham et al., 2018, Sec. 2.4)."""

NAO_PRIMITIVES: tuple[str, ...] = (
    "skip_connect", "conv_1x1", "conv_3x3", "conv_1x3_3x1", "conv_1x7_7x1", "max_pool_2x2",
    "max_pool_3x3", "max_pool_5x5", "avg_pool_2x2", "avg_pool_3x3", "avg_pool_5x5",
)  # fmt: skip
"""Names of the eleven primitives of NAONet's cells (Luo et al., 2018)."""


def primitive(name: str) -> Primitive:
    """Look a primitive up by name, e.g. ``primitive("sep_conv_3x3")``.

    Raises NatlibError on an unknown name, listing the known ones.
    """
    try:
        return _BY_NAME[name]
    except (KeyError, TypeError):
        raise NatlibError(
            f"unknown primitive {name!r}; allowed are {', '.join(ALL_PRIMITIVES)}"
        ) from None
