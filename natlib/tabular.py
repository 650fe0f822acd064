"""Complete spaces as arrays: what a rewriting can reach at best, exactly.

A ``Space`` holds a table (natbench, NAS-Bench-201) in which every architecture is one number, its
code: the primitives of its edges as digits, the first edge the most significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from natlib import nasbench201, natbench
from natlib.errors import NatlibError
from natlib.genotype import Cell, Edge, Genotype
from natlib.primitives import PRIMITIVES, primitive
from natlib.transitions import Transitions

Codes = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Space:
    """All architectures of one graph over K primitives on E edges, with what a table says of each.

    ``edges`` are (source, target) in natlib's numbering, grouped by target; ``strides`` those at
    which each edge is met, since one choice serves normal and reduction cells. Arrays by code, of
    K ** E: ``validation`` and ``test`` accuracy (0..1), ``params``, ``madds``, ``latency`` (ms),
    and ``computation``, equal for architectures that compute the same. ``checksum`` is the table's.
    """

    name: str
    primitives: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, ...], ...]
    validation: Values
    test: Values
    params: Values
    madds: Values
    latency: Values
    computation: Codes
    checksum: str

    @property
    def size(self) -> int:
        """How many architectures there are."""
        return len(self.validation)

    @cached_property
    def powers(self) -> Codes:
        """What a step of each edge's digit adds to the code, (E,)."""
        return len(self.primitives) ** np.arange(len(self.edges), dtype=np.int64)[::-1]

    def digits(self, codes: Codes) -> Codes:
        """Return the primitive indexes (..., E) of codes (...)."""
        return np.asarray(codes)[..., None] // self.powers % len(self.primitives)

    def codes(self, digits: Codes) -> Codes:
        """Return the codes (...) of primitive indexes (..., E)."""
        return digits @ self.powers

    def genotype(self, code: int) -> Genotype:
        """Return the genotype of a code: both cells alike, the last node put out."""
        names = [self.primitives[d] for d in self.digits(np.asarray(code))]
        edges = tuple(Edge(s, t, name) for (s, t), name in zip(self.edges, names, strict=True))
        cell = Cell(edges, (self.edges[-1][1],))
        return Genotype(cell, cell)

    def code(self, genotype: Genotype) -> int:
        """Return the code of a genotype as ``genotype`` makes it."""
        digits = [self.primitives.index(e.primitive) for e in genotype.normal.edges]
        return int(self.powers @ np.array(digits))

    def allowed(self, rule: Transitions) -> NDArray[np.bool_]:
        """Return what a rule allows on each edge, at all its strides: bool (E, source, target)."""
        masks = rule.mask().numpy()
        return np.stack([masks[[s - 1 for s in strides]].all(0) for strides in self.strides])

    def cheaper(self, codes: Codes, inputs: Codes) -> NDArray[np.bool_]:
        """Say where neither params nor MAdds exceed those of ``inputs`` (broadcast)."""
        return (self.params[codes] <= self.params[inputs]) & (
            self.madds[codes] <= self.madds[inputs]
        )

    def closure(self, allowed: NDArray[np.bool_], code: int) -> Codes:
        """Return what one rewriting makes of an architecture at no more cost, itself included."""
        reached = np.zeros(1, dtype=np.int64)
        for edge, digit in enumerate(self.digits(np.asarray(code))):
            steps = np.flatnonzero(allowed[edge, digit]) * self.powers[edge]
            reached = (reached[:, None] + steps).ravel()
        return reached[self.cheaper(reached, np.asarray(code))]

    def closures(self, allowed: NDArray[np.bool_]) -> list[Codes]:
        """Return the ``closure`` of every architecture, by code."""
        return [self.closure(allowed, code) for code in range(self.size)]

    def split(self, held_out: int, generator: torch.Generator) -> tuple[Codes, Codes]:
        """Draw ``held_out`` architectures; return them and those that compute as none of them does.

        Raises NatlibError if that leaves nothing.
        """
        order = torch.randperm(self.size, generator=generator).numpy()
        out = order[:held_out]
        rest = np.flatnonzero(~np.isin(self.computation, self.computation[out]))
        if not 0 < held_out < self.size or not len(rest):
            raise NatlibError(f"held_out = {held_out}: {self.name} has {self.size} architectures")
        return out, rest


def from_natbench(chooses: int | None = None) -> Space:
    """Return natbench as a space; raises NatlibError while its table is not complete.

    Accuracies are means over both trainings; or, if ``chooses`` is the seed of one, validation
    accuracy is that training's and test accuracy the other's. Test images alone do not make a
    report independent of the choice: a training that happened to go well does so on both.
    """
    table = natbench.load()
    if not table.complete:
        raise NatlibError(
            f"natbench holds {table.trainings} of {natbench.SIZE * len(natbench.SEEDS)} trainings; "
            "what is best can only be told of the whole space: `python -m natlib.natbench build` "
            "trains the rest"
        )
    strides = tuple((1, 2) if source < 2 else (1,) for source, _ in natbench.EDGES)
    name = "natbench" if chooses is None else f"natbench {chooses}"
    space = _space(name, PRIMITIVES, natbench.EDGES, strides, table.entries,
                   [e.trained_as for e in table.entries], str(table.card["sha256"]))  # fmt: skip
    if chooses is None:
        return space
    by_training = {
        what: np.array([getattr(e, what) for e in table.entries]) for what in ("validation", "test")
    }
    one = natbench.SEEDS.index(chooses)
    return replace(
        space, validation=by_training["validation"][:, one], test=by_training["test"][:, 1 - one]
    )


def in_turn(name: str, seed: int) -> str:
    """Return the space that seed ``seed`` of a study works in.

    On natbench seeds take turns: by the first training of all architectures even ones learn and
    choose, by the second odd ones, and each reports the other's. Any other space is itself.
    """
    return f"natbench {natbench.SEEDS[seed % 2]}" if name == "natbench" else name


def from_nasbench201(dataset: str) -> Space:
    """Return NAS-Bench-201 on one data set as a space; raises NatlibError as its ``load`` does.

    Its cells keep the resolution, so all edges are at stride 1.
    """
    table = nasbench201.load(dataset)
    names, edges = nasbench201.PRIMITIVES, nasbench201.EDGES
    digits = np.array([[names.index(p) for p in e.primitives] for e in table.entries])
    by_code = np.argsort(digits @ len(names) ** np.arange(len(edges))[::-1])
    entries = [table.entries[i] for i in by_code]
    same = np.unique([e.isomorphism for e in entries], return_inverse=True)[1]
    return _space(f"nasbench201 {dataset}", names, edges, ((1,),) * len(edges), entries,
                  same.tolist(), table.checksum)  # fmt: skip


def _space(
    name: str, primitives: tuple[str, ...], edges: tuple[tuple[int, int], ...],
    strides: tuple[tuple[int, ...], ...],
    entries: Sequence[natbench.Entry] | Sequence[nasbench201.Entry], computation: list[int],
    checksum: str,
) -> Space:  # fmt: skip
    columns = {
        "validation": "mean_validation", "test": "mean_test", "params": "params", "madds": "madds",
        "latency": "latency_ms",
    }  # fmt: skip
    arrays: dict[str, Any] = {
        ours: np.array([getattr(e, theirs) for e in entries], dtype=np.float64)
        for ours, theirs in columns.items()
    }
    return Space(name, primitives, edges, strides, **arrays,
                 computation=np.array(computation), checksum=checksum)  # fmt: skip


def checksum(name: str) -> str:
    """Return the checksum of the table behind a space, which need not be there, or be complete."""
    if name.split()[0] == "natbench":
        return str(natbench.load().card["sha256"])
    return nasbench201.CONTENT


def lacks(name: str) -> str:
    """Say why a space cannot be loaded, "" if it can."""
    try:
        load(name)
    except NatlibError as error:
        return str(error)
    return ""


@lru_cache(maxsize=4)
def load(name: str) -> Space:
    """Return the space called ``natbench``, ``natbench SEED`` or ``nasbench201 DATASET``.

    The second is ``from_natbench(SEED)``.

    Raises NatlibError on another name, and where its table is missing or not complete.
    """
    match name.split():
        case ["natbench"]:
            return from_natbench()
        case ["natbench", seed] if seed in map(str, natbench.SEEDS):
            return from_natbench(int(seed))
        case ["nasbench201", dataset]:
            return from_nasbench201(dataset)
    known = "'natbench', 'natbench 0', 'natbench 1', 'nasbench201 DATASET'"
    raise NatlibError(f"space {name!r} is not one of {known}")


# What the gain comes from ------------------------------------------------------------------------

KINDS = ("to a cheaper operation", "to skip", "to null", "null to skip")


def kind_of(source: str, target: str) -> str | None:
    """Return the kind of a transition, one of ``KINDS``, or None if the primitive stays."""
    if source == target:
        return None
    if source == "null":
        return "null to skip"
    of = {"skip": "to skip", "null": "to null"}
    return of.get(primitive(target).kind, "to a cheaper operation")


def attribute(space: Space, before: Codes, after: Codes, values: Values) -> Values:
    """Share a rewriting's change of ``values`` among its edges: Shapley values, (len, E).

    The exact mean, over all orders in which the edges could be rewritten, of what each adds; rows
    sum to values[after] - values[before]. Source: Shapley (1953).
    """
    edges = len(space.edges)
    steps = (space.digits(after) - space.digits(before)) * space.powers
    shares = np.zeros(steps.shape)
    for size in range(edges):
        weight = 1 / (edges * math.comb(edges - 1, size))
        for chosen in combinations(range(edges), size):
            base = before + steps[:, list(chosen)].sum(1)
            for edge in set(range(edges)) - set(chosen):
                shares[:, edge] += weight * (values[base + steps[:, edge]] - values[base])
    return shares
