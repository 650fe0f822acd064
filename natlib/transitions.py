"""Which primitive may replace which on an edge: the transition rules of NAT and NAT++."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from natlib.errors import NatlibError
from natlib.genotype import Edge, Genotype
from natlib.primitives import PRIMITIVES, Cost, Primitive, primitive

if TYPE_CHECKING:
    import torch

STRIDES = (1, 2)

# Every cost is c * (a * c + b) in the channels c, so an order of two costs that holds at both ends
# of this range holds for every channel count inside it.
_CHANNELS = (8, 2**20)


def raises_cost(source: Primitive, target: Primitive, stride: int) -> bool:
    """Say whether the transition raises a network's params or MAdds, for some channels >= 8.

    Counted as in the papers' network tables: convolutions and batch norms, so pooling and
    stride-1 skips are free. At stride 2 a skip is a factorized reduction: it is not.
    """
    return any(
        target.weights(c, stride) + 2 * c * target.batch_norms(stride)
        > source.weights(c, stride) + 2 * c * source.batch_norms(stride)
        or target.conv_madds(c, 32, stride) > source.conv_madds(c, 32, stride)
        for c in _CHANNELS
    )


def _never_dearer(source: Primitive, target: Primitive, stride: int) -> bool:
    """Say whether the cost falls or stays in the counting of NAT++ Fig. 4 as well."""
    return all(
        _full(target, c, stride).within(_full(source, c, stride)) for c in _CHANNELS
    ) and not raises_cost(source, target, stride)


def _full(p: Primitive, channels: int, stride: int) -> Cost:
    return p.cost(channels, 32, stride)


def _nat(source: Primitive, target: Primitive, stride: int) -> bool:
    if source == target:
        return True
    if source.kind in ("skip", "null"):
        return target.kind in ("skip", "null")
    return target.kind in ("skip", "null")


def _natpp(source: Primitive, target: Primitive, stride: int) -> bool:
    if source == target or (source.kind, target.kind) == ("null", "skip"):
        return True
    falls = target.rank < source.rank
    grows = target.size > source.size
    return not falls and not grows


def _cost_safe(source: Primitive, target: Primitive, stride: int) -> bool:
    if source == target or _never_dearer(source, target, stride):
        return True
    return _natpp(source, target, stride) and not raises_cost(source, target, stride)


@dataclass(frozen=True)
class Transitions:
    """A rule over a set of primitives: which may replace which, at which stride.

    ``name`` is the rule's name, ``primitives`` the names of the search space in order: the masks'
    rows (source) and columns (target) follow it.
    """

    name: str
    primitives: tuple[str, ...]
    rule: Callable[[Primitive, Primitive, int], bool]

    def allows(self, source: str, target: str, stride: int = 1) -> bool:
        """Say whether an edge that carries ``source`` at this stride may carry ``target`` next.

        Raises NatlibError on a primitive outside the search space or a stride other than 1, 2.
        """
        for name in (source, target):
            if name not in self.primitives:
                raise NatlibError(
                    f"primitive {name!r} is not in this search space; allowed are "
                    f"{', '.join(self.primitives)}"
                )
        if stride not in STRIDES:
            raise NatlibError(f"stride {stride!r} is not one of {STRIDES}")
        return self.rule(primitive(source), primitive(target), stride)

    def pairs(self, stride: int = 1) -> frozenset[tuple[str, str]]:
        """All allowed ordered pairs (source, target) at this stride, staying put included."""
        names = self.primitives
        return frozenset((s, t) for s in names for t in names if self.allows(s, t, stride))

    def mask(self) -> torch.Tensor:
        """Return the masks for both strides: bool (2, K, K), [stride - 1, source, target]."""
        import torch

        allowed = [
            [[self.allows(s, t, stride) for t in self.primitives] for s in self.primitives]
            for stride in STRIDES
        ]
        return torch.tensor(allowed, dtype=torch.bool)

    def violations(self, before: Genotype, after: Genotype) -> list[tuple[str, Edge, Edge]]:
        """List the edges (cell name, before, after) of a rewriting that this rule forbids.

        Edges are compared in order; primitives outside the search space are judged by the rule
        too. Raises NatlibError if the two genotypes are not the same graph.
        """
        found = []
        for (name, a), (_, b) in zip(before.cells, after.cells, strict=True):
            ends_a = [(e.source, e.target) for e in a.edges]
            ends_b = [(e.source, e.target) for e in b.edges]
            if ends_a != ends_b or a.concat != b.concat:
                raise NatlibError(f"the {name} cells are not the same graph")
            for old, new in zip(a.edges, b.edges, strict=True):
                stride = edge_stride(old.source, name)
                if not self.rule(primitive(old.primitive), primitive(new.primitive), stride):
                    found.append((name, old, new))
        return found


def edge_stride(source: int, cell: str) -> int:
    """Stride of an edge: 2 from the inputs of a reduction cell, else 1."""
    return 2 if cell == "reduce" and source < 2 else 1


@cache
def nat(primitives: tuple[str, ...] = PRIMITIVES) -> Transitions:
    """NAT's rule: keep, anything -> skip or null, skip <-> null (NeurIPS 2019, Sec. 3.2)."""
    return Transitions("nat", primitives, _nat)


@cache
def natpp(primitives: tuple[str, ...] = PRIMITIVES) -> Transitions:
    """NAT++'s two-level rule: neither kind nor kernel grows dearer, and null -> skip.

    77 allowed pairs over the 13 primitives (TPAMI 2021, Sec. 4.1 and Fig. 4).
    """
    return Transitions("natpp", primitives, _natpp)


@cache
def natpp_cost_safe(primitives: tuple[str, ...] = PRIMITIVES) -> Transitions:
    """natlib's own rule: NAT++ plus every pair that costs no more, minus those that cost more.

    Costs are compared at the edge's stride for every channel count from 8 up, so that a rewritten
    DARTS-style network never has more params or MAdds (network counting) than its input; in
    hand-crafted ones a skip may be a projection, which costs. Additions, such as separable ->
    conv_1x1, must cost no more in the counting of NAT++ Fig. 4 as well.
    """
    return Transitions("natpp_cost_safe", primitives, _cost_safe)


@cache
def free(primitives: tuple[str, ...] = PRIMITIVES) -> Transitions:
    """No restriction: every primitive may replace every other, as in NAO. Not in ``RULES``."""
    return Transitions("free", primitives, lambda source, target, stride: True)


RULES: dict[str, Callable[..., Transitions]] = {
    "nat": nat,
    "natpp": natpp,
    "natpp_cost_safe": natpp_cost_safe,
}


class _Titles(dict[str, str]):
    def __missing__(self, rule: str) -> str:
        return rule


TITLES = _Titles({"nat": "NAT", "natpp": "NAT++", "natpp_cost_safe": "cost-safe"})
"""What pages call each rule, and the method that goes by it; another rule goes by its own name."""

ORIGINAL = "original"
"""What pages call the method that changes nothing."""


def by_name(name: str, primitives: tuple[str, ...] = PRIMITIVES) -> Transitions:
    """Return the rule called ``name``; NatlibError lists the names if it is unknown."""
    if name not in RULES:
        raise NatlibError(f"unknown transitions {name!r}; allowed are {', '.join(RULES)}")
    return RULES[name](primitives)
