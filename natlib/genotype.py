"""Genotypes as pure data: a network's cells as graphs whose edges carry primitives."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations, product
from operator import attrgetter
from pathlib import Path
from typing import Any

from natlib.errors import NatlibError
from natlib.primitives import primitive

INPUTS = 2


@dataclass(frozen=True)
class Edge:
    """One operation of a cell: ``primitive`` applied to node ``source``, added into ``target``."""

    source: int
    target: int
    primitive: str


SOURCE, TARGET, PRIMITIVE = map(attrgetter, ("source", "target", "primitive"))
"""An edge's fields, for ``map``: policies read and write hundreds of thousands a second."""


@cache
def _edge(source: int, target: int, name: str) -> Edge:
    """One edge object for all edges that are equal; refuses an unknown primitive."""
    return Edge(source, target, primitive(name).name)


@dataclass(frozen=True)
class Cell:
    """A directed acyclic graph: nodes 0 and 1 are inputs, 2..N+1 sum their incoming edges.

    The output concatenates the nodes of ``concat`` along channels. Edges are kept grouped by
    target, in the given order inside a group. Two edges may join the same two nodes.

    Raises NatlibError on an unknown primitive, an edge that does not come from an earlier node,
    an intermediate node without incoming edge, or a concat that names no intermediate node or
    one twice.
    """

    edges: tuple[Edge, ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = tuple(sorted(self.edges, key=lambda e: e.target))
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "concat", tuple(self.concat))
        if not edges:
            raise NatlibError("a cell needs at least one edge, got none")
        last = max(e.target for e in edges)
        for e in edges:
            primitive(e.primitive)
            if not e.target >= INPUTS:
                raise NatlibError(
                    f"edge {e.source}->{e.target} ends in an input; targets start at {INPUTS}"
                )
            if not 0 <= e.source < e.target:
                raise NatlibError(
                    f"edge {e.source}->{e.target} ({e.primitive}) does not come from an earlier "
                    f"node; allowed sources are 0..{e.target - 1}"
                )
        targets = {e.target for e in edges}
        for node in range(INPUTS, last + 1):
            if node not in targets:
                raise NatlibError(
                    f"node {node} has no incoming edge; every node of {INPUTS}..{last} needs one"
                )
        if not self.concat:
            raise NatlibError("concat is empty; it must name at least one intermediate node")
        for node in self.concat:
            if not INPUTS <= node <= last:
                raise NatlibError(
                    f"concat names node {node}; allowed are intermediate nodes {INPUTS}..{last}"
                )
        if len(set(self.concat)) != len(self.concat):
            raise NatlibError(f"concat {self.concat} names a node twice")

    @cached_property
    def nodes(self) -> int:
        """The number of intermediate nodes."""
        return self.edges[-1].target - INPUTS + 1

    @cached_property
    def in_edges(self) -> tuple[tuple[Edge, ...], ...]:
        """Incoming edges of each intermediate node, in order."""
        groups: list[list[Edge]] = [[] for _ in range(self.nodes)]
        for e in self.edges:
            groups[e.target - INPUTS].append(e)
        return tuple(tuple(g) for g in groups)

    @cached_property
    def live(self) -> frozenset[int]:
        """Nodes (inputs included) whose value reaches the output over edges that are not null."""
        seen = set(self.concat)
        for e in sorted(self.edges, key=lambda e: -e.target):
            if e.target in seen and e.primitive != "null":
                seen.add(e.source)
        return frozenset(seen)

    def with_primitives(self, names: Sequence[str]) -> Cell:
        """Return the same graph with the edges' primitives replaced, in the order of ``edges``.

        Raises NatlibError on an unknown primitive, or if the number of names is not that of edges.
        """
        if len(names) != len(self.edges):
            raise NatlibError(f"{len(names)} primitives for {len(self.edges)} edges")
        # The graph is valid already, so only the names are looked at: policies make thousands.
        cell = object.__new__(Cell)
        edges = tuple(map(_edge, map(SOURCE, self.edges), map(TARGET, self.edges), names))
        cell.__dict__.update(edges=edges, concat=self.concat)
        return cell

    def fingerprint(self) -> str:
        """Hash what the cell computes: equal for relabelled nodes, reordered edges, dead parts.

        Null edges and nodes that do not reach the output are left out; then the least edge list
        over all relabellings of the intermediate nodes is hashed.
        """
        edges = [e for e in self.edges if e.primitive != "null" and e.target in self.live]
        kept = sorted(n for n in self.live if n >= INPUTS)

        # Colours first: only nodes that look alike from above and below may change places.
        down: dict[int, str] = {0: "in0", 1: "in1"}
        for n in kept:
            down[n] = _digest(sorted((e.primitive, down[e.source]) for e in edges if e.target == n))
        up: dict[int, str] = {}
        for n in reversed(kept):
            outgoing = sorted((e.primitive, up[e.target]) for e in edges if e.source == n)
            up[n] = _digest([n in self.concat, outgoing])
        classes: dict[tuple[str, str], list[int]] = {}
        for n in kept:
            classes.setdefault((down[n], up[n]), []).append(n)
        ordered = [classes[k] for k in sorted(classes)]
        best: list[Any] | None = None
        for choice in product(*(permutations(c) for c in ordered)):
            order = [n for group in choice for n in group]
            label = {0: 0, 1: 1} | {n: i + INPUTS for i, n in enumerate(order)}
            form: list[Any] = sorted([label[e.source], label[e.target], e.primitive] for e in edges)
            form.append(sorted(label[n] for n in self.concat))
            best = form if best is None or json.dumps(form) < json.dumps(best) else best
        return _digest(best)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network: ``normal`` keeps the resolution, ``reduce`` halves it."""

    normal: Cell
    reduce: Cell

    @property
    def cells(self) -> tuple[tuple[str, Cell], tuple[str, Cell]]:
        """The cells with their names, normal first."""
        return ("normal", self.normal), ("reduce", self.reduce)

    def with_primitives(self, names: Sequence[str]) -> Genotype:
        """Return the same graphs with other primitives: normal edges first, then reduction's."""
        k = len(self.normal.edges)
        return Genotype(
            self.normal.with_primitives(names[:k]), self.reduce.with_primitives(names[k:])
        )

    @cached_property
    def primitives(self) -> tuple[str, ...]:
        """The primitives of all edges, normal first, in the order of ``edges``."""
        return tuple(e.primitive for _, cell in self.cells for e in cell.edges)

    def pruned(self) -> Genotype:
        """The same function with null for every edge into a node that the output does not read."""
        return self.with_primitives(
            [
                e.primitive if e.target in cell.live else "null"
                for _, cell in self.cells
                for e in cell.edges
            ]
        )

    def fingerprint(self) -> str:
        """Hash what the genotype computes; see ``Cell.fingerprint``."""
        return _digest([self.normal.fingerprint(), self.reduce.fingerprint()])

    def to_json(self) -> dict[str, Any]:
        """Return the natlib JSON form: lists of [primitive, source, target], and the concats."""
        out: dict[str, Any] = {}
        for name, cell in self.cells:
            out[name] = [[e.primitive, e.source, e.target] for e in cell.edges]
            out[f"{name}_concat"] = list(cell.concat)
        return out

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Genotype:
        """Read the form of ``to_json``; other keys than the four and "source" are refused.

        Raises NatlibError on missing or unknown keys, malformed edges and invalid cells.
        """
        needed = {"normal", "normal_concat", "reduce", "reduce_concat"}
        if not isinstance(value, Mapping):
            raise NatlibError(
                f"a genotype must be a mapping with keys {sorted(needed)}, "
                f"got {type(value).__name__}"
            )
        if missing := needed - set(value):
            raise NatlibError(f"genotype lacks {sorted(missing)}; it needs {sorted(needed)}")
        if unknown := set(value) - needed - {"source"}:
            raise NatlibError(
                f"genotype has unknown keys {sorted(unknown)}; allowed are {sorted(needed)}"
            )
        cells = []
        for name in ("normal", "reduce"):
            try:
                cells.append(_cell(value[name], value[f"{name}_concat"]))
            except NatlibError as error:
                raise NatlibError(f"{name} cell: {error}") from None
        return Genotype(*cells)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cell(edges: Any, concat: Any) -> Cell:
    if not isinstance(edges, list | tuple) or not isinstance(concat, list | tuple | range):
        raise NatlibError("edges and concat must be lists")
    built = []
    for item in edges:
        match item:
            case [str(name), source, target] if _is_int(source) and _is_int(target):
                built.append(Edge(source, target, name))
            case _:
                raise NatlibError(f"edge {item!r} is not [primitive, source, target]")
    if not all(_is_int(n) for n in concat):
        raise NatlibError(f"concat {concat!r} must hold node numbers")
    return Cell(tuple(built), tuple(concat))


def parse(text: str) -> Genotype:
    """Read a genotype from natlib JSON, a DARTS-style Python literal or a NAS-Bench-201 string.

    The literal is ``Genotype(normal=[(op, source), ...], normal_concat=range(2, 6), ...)`` with
    two edges a node, as DARTS prints it, or with (op, source, target) triples. Nothing in it is
    executed. The string is read by ``parse_nasbench201``. Raises NatlibError with the place of the
    fault.
    """
    if text.lstrip().startswith("|"):
        return parse_nasbench201(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        return Genotype.from_json(_literal_fields(text.strip(), f"{e.msg}, line {e.lineno}"))
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise NatlibError(f"the genotype's JSON cannot be read: {error}") from None
    return Genotype.from_json(value)


def _literal_fields(text: str, not_json: str) -> dict[str, Any]:
    """Read the keywords of a ``Genotype(...)`` literal; ``not_json`` says why it is no JSON."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NatlibError(f"neither JSON ({not_json}) nor a Genotype(...) literal") from None
    if not (
        isinstance(tree, ast.Call)
        and isinstance(tree.func, ast.Name)
        and tree.func.id == "Genotype"
        and not tree.args
    ):
        raise NatlibError("a Python genotype must read Genotype(normal=[...], ...)")
    fields = {str(k.arg): _literal(k.value, text) for k in tree.keywords}
    for name in ("normal", "reduce"):
        if isinstance(fields.get(name), list):
            fields[name] = _with_targets(fields[name])
    return fields


def read(path: Path) -> Genotype:
    """Read a genotype from a file that ``parse`` understands.

    Raises NatlibError if there is no such file, if it cannot be read or is not UTF-8, and if its
    content is no genotype, naming the file.
    """
    try:
        return parse(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NatlibError(f"there is no file {path}") from None
    except OSError as error:
        raise NatlibError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise NatlibError(f"{path} is not text in UTF-8: {error.reason}") from None
    except NatlibError as error:
        raise NatlibError(f"{path}: {error}") from None


def _literal(node: ast.expr, text: str) -> Any:
    """Return the value of a string, a number, ``range(a, b)``, or a list of them."""
    match node:
        case ast.List() | ast.Tuple():
            return [_literal(item, text) for item in node.elts]
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Call(
            func=ast.Name(id="range"),
            args=[ast.Constant(value=int(first)), ast.Constant(value=int(last))],
            keywords=[],
        ) if last - first <= 1000:
            return list(range(first, last))
    source = str(ast.get_source_segment(text, node))
    raise NatlibError(
        f"{source[:60]!r} is not a plain value; allowed are strings, numbers, lists and range(a, b)"
    )


def _with_targets(edges: list[Any]) -> list[Any]:
    """Give DARTS-style pairs their targets: edges 2i and 2i+1 end in node i + 2."""
    if all(isinstance(e, list) and len(e) == 2 for e in edges):
        return [[op, source, i // 2 + INPUTS] for i, (op, source) in enumerate(edges)]
    return edges


def format_darts(genotype: Genotype) -> str:
    """Write the DARTS-style literal (triples unless every node has exactly two inputs)."""
    parts = []
    for name, cell in genotype.cells:
        pairs = all(len(g) == 2 for g in cell.in_edges)
        edges = [
            (e.primitive, e.source) if pairs else (e.primitive, e.source, e.target)
            for e in cell.edges
        ]
        parts.append(f"{name}={edges!r}, {name}_concat={list(cell.concat)!r}")
    return f"Genotype({', '.join(parts)})"


NASBENCH201 = {
    "none": "null",
    "skip_connect": "skip_connect",
    "nor_conv_1x1": "conv_1x1",
    "nor_conv_3x3": "conv_3x3",
    "avg_pool_3x3": "avg_pool_3x3",
}
"""The primitives of NAS-Bench-201 and what they are called here."""


def parse_nasbench201(text: str) -> Genotype:
    """Read a NAS-Bench-201 string, e.g. ``|none~0|+|nor_conv_3x3~0|skip_connect~1|+...``.

    Its node 0, the cell's input, becomes input 1 here (input 0 stays unused), the others follow,
    and the last alone is put out. Normal and reduction cell are the same. Any number of nodes,
    each with one edge from every earlier one. Raises NatlibError with the place of the fault.
    """
    edges = []
    groups = text.strip().split("+")
    for node, group in enumerate(groups, 1):
        items = group.strip("|").split("|")
        if not (group.startswith("|") and group.endswith("|") and len(items) == node):
            raise NatlibError(
                f"{group!r} is not node {node} of a NAS-Bench-201 string: it needs {node} of "
                "|primitive~source|"
            )
        for source, item in enumerate(items):
            name, _, number = item.partition("~")
            if name not in NASBENCH201:
                raise NatlibError(
                    f"unknown primitive {name!r} in {item!r}; NAS-Bench-201 has "
                    f"{', '.join(NASBENCH201)}"
                )
            if number != str(source):
                raise NatlibError(f"{item!r} in {group!r} should come from node {source}")
            edges.append(Edge(source + 1, node + 1, NASBENCH201[name]))
    cell = Cell(tuple(edges), (len(groups) + 1,))
    return Genotype(cell, cell)


def format_nasbench201(genotype: Genotype) -> str:
    """Write the NAS-Bench-201 string of a genotype that ``parse_nasbench201`` could have read.

    Raises NatlibError on cells that differ, other edges or another concat than such a string
    describes, and primitives that NAS-Bench-201 lacks.
    """
    cell = genotype.normal
    names = {ours: theirs for theirs, ours in NASBENCH201.items()}
    last = cell.nodes + 1
    groups = []
    for node in range(2, last + 1):
        sources = sorted((e.source, e.primitive) for e in cell.edges if e.target == node)
        if [s for s, _ in sources] != list(range(1, node)):
            raise NatlibError(
                f"node {node} has edges from {[s for s, _ in sources]}; in NAS-Bench-201 it has "
                f"one from each of {list(range(1, node))}"
            )
        for _, name in sources:
            if name not in names:
                raise NatlibError(
                    f"primitive {name!r} is not in NAS-Bench-201; allowed are {', '.join(names)}"
                )
        groups.append("|" + "".join(f"{names[p]}~{s - 1}|" for s, p in sources))
    if cell.concat != (last,) or genotype.reduce != cell:
        raise NatlibError(
            f"concat {cell.concat}: a NAS-Bench-201 cell puts out its last node {last} alone, and "
            "normal and reduction cell are the same"
        )
    return "+".join(groups)
