from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from natlib import NatlibError
from natlib.genotype import (
    INPUTS,
    NASBENCH201,
    Cell,
    Edge,
    Genotype,
    format_darts,
    format_nasbench201,
    parse,
    parse_nasbench201,
    read,
)
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES
from natlib.zoo import ZOO
from tests.strategies import any_genotypes, cells, chain

DARTS_V2 = """
Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0),
('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0),
('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))
"""
SMALL: dict[str, Any] = {
    "normal": [["conv_3x3", 0, 2], ["null", 1, 2], ["skip_connect", 2, 3], ["conv_1x1", 0, 3]],
    "normal_concat": [2, 3],
    "reduce": [["max_pool_3x3", 0, 2], ["max_pool_3x3", 1, 2]],
    "reduce_concat": [2],
}


def edited(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


# --- shape ------------------------------------------------------------------------------------


def test_a_cell_knows_its_nodes_and_their_inputs() -> None:
    cell = Cell((Edge(0, 3, "null"), Edge(1, 2, "conv_1x1"), Edge(2, 3, "skip_connect")), (3,))
    assert cell.nodes == 2
    assert cell.in_edges == (
        (Edge(1, 2, "conv_1x1"),),
        (Edge(0, 3, "null"), Edge(2, 3, "skip_connect")),
    )


def test_edges_are_grouped_by_target_and_keep_their_order_there() -> None:
    a, b, c = Edge(1, 3, "null"), Edge(0, 3, "conv_3x3"), Edge(0, 2, "conv_1x1")
    assert Cell((a, b, c), (2, 3)).edges == (c, a, b)
    assert Cell((b, c, a), (2, 3)).edges == (c, b, a)


def test_two_edges_may_join_the_same_two_nodes() -> None:
    assert len(Cell((Edge(0, 2, "null"), Edge(0, 2, "null")), (2,)).edges) == 2


def test_live_nodes_reach_the_output_over_edges_that_are_not_null() -> None:
    cell = Cell(
        (
            Edge(0, 2, "conv_3x3"),
            Edge(1, 3, "conv_3x3"),  # node 3 feeds only a null edge
            Edge(2, 4, "skip_connect"),
            Edge(3, 4, "null"),
            Edge(4, 5, "conv_1x1"),  # node 5 is not in concat
        ),
        (4,),
    )
    assert cell.live == {0, 2, 4}


@given(cells(ALL_PRIMITIVES, degrees=(1, 2, 3)))
def test_live_agrees_with_walking_every_path(cell: Cell) -> None:
    def reaches(node: int) -> bool:
        return node in cell.concat or any(
            e.source == node and e.primitive != "null" and reaches(e.target) for e in cell.edges
        )

    assert cell.live == {n for n in range(cell.nodes + INPUTS) if reaches(n)}


@given(any_genotypes(), st.randoms(use_true_random=False))
def test_with_primitives_keeps_the_graph(genotype: Genotype, draw: random.Random) -> None:
    names = [draw.choice(ALL_PRIMITIVES) for _ in genotype.primitives]
    changed = genotype.with_primitives(names)
    assert changed.primitives == tuple(names)
    for (_, a), (_, b) in zip(genotype.cells, changed.cells, strict=True):
        assert [(e.source, e.target) for e in a.edges] == [(e.source, e.target) for e in b.edges]
        assert a.concat == b.concat
    assert changed.with_primitives(genotype.primitives) == genotype


@pytest.mark.parametrize("number", [0, 5, 7])
def test_with_primitives_needs_one_for_each_edge(number: int) -> None:
    with pytest.raises(NatlibError, match="primitives for"):
        Genotype.from_json(SMALL).with_primitives(["null"] * number)


# --- JSON and literals ------------------------------------------------------------------------


@given(any_genotypes())
def test_json_and_literal_round_trip(genotype: Genotype) -> None:
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert parse(json.dumps(genotype.to_json())) == genotype
    assert parse(format_darts(genotype)) == genotype


@pytest.mark.parametrize("name", ZOO)
def test_published_genotypes_round_trip(name: str) -> None:
    assert parse(json.dumps(ZOO[name].to_json(), indent=2)) == ZOO[name]
    assert parse(format_darts(ZOO[name])) == ZOO[name]


def test_the_json_form() -> None:
    assert Genotype.from_json(SMALL).to_json() == SMALL
    assert Genotype.from_json(edited(source="a paper")) == Genotype.from_json(SMALL)


def test_the_literal_that_darts_prints_is_read() -> None:
    assert parse(DARTS_V2) == ZOO["DARTS"]


def test_literal_is_in_pairs_only_where_every_node_has_two_inputs() -> None:
    pairs, triples = chain("conv_3x3", "null"), chain("conv_3x3", "null", "conv_1x1")
    text = format_darts(Genotype(pairs, triples))
    assert text == (
        "Genotype(normal=[('conv_3x3', 0), ('null', 1)], normal_concat=[2], "
        "reduce=[('conv_3x3', 0, 2), ('null', 1, 2), ('conv_1x1', 2, 3)], reduce_concat=[3])"
    )


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('{mark}').touch()",
        "open('{mark}', 'w')",
        "[open('{mark}', 'w')]",
        "[('null', (lambda: open('{mark}', 'w'))())]",
        "[x for x in [open('{mark}', 'w')]]",
        "f\"{{open('{mark}', 'w')}}\"",
        "(y := open('{mark}', 'w'))",
        "range(open('{mark}', 'w'), 2)",
        "{{1: open('{mark}', 'w')}}",
        "*open('{mark}', 'w')",
    ],
)
def test_nothing_in_a_literal_is_executed(expression: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = expression.format(mark=mark)
    whole = f"Genotype(normal={code}, normal_concat=[2], reduce=[('null', 0)], reduce_concat=[2])"
    for text in (code, whole, f"Genotype(**{{'normal': {code}}})", f"Genotype({code})"):
        with pytest.raises(NatlibError):
            parse(text)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "null",
        "[]",
        "3",
        "9" * 5000,
        "[" * 100_000,
        "(" * 10_000,
        "Genotype",
        "Genotype(",
        "Genotype()",
        "genotype(normal=[])",
        "Genotype(normal=[], normal_concat=[], reduce=[], reduce_concat=[])",
        "Genotype(normal=range('a', 2))",
        "Genotype(normal=range())",
        "Genotype(normal=range(0, 10**10))",
        "Genotype(normal=range(0, 10000000000))",
        "Genotype(normal={[]: 1})",
        "Genotype(normal=" + "-" * 5000 + "1)",
        "Genotype(normal=" + "+".join("1" * 5000) + ")",
        "import os",
        "Genotype(normal=b'ab', normal_concat=1, reduce=None, reduce_concat=...)",
    ],
    ids=range(22),
)
def test_text_that_is_no_genotype_is_one_clear_error(text: str) -> None:
    with pytest.raises(NatlibError) as error:
        parse(text)
    assert 10 < len(str(error.value)) < 400


@given(st.text())
def test_no_text_makes_parse_fail_in_another_way(text: str) -> None:
    with pytest.raises(NatlibError):
        parse(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(SMALL)), values)
def test_no_json_value_makes_from_json_fail_in_another_way(key: str, value: Any) -> None:
    assume(value != [2])
    with pytest.raises(NatlibError):
        Genotype.from_json(edited(**{key: value}))


# --- what is refused, and how it is said ------------------------------------------------------

BAD = {
    "unknown primitive": (
        edited(reduce=[["sep_conv_9x9", 0, 2]]),
        ["reduce cell", "'sep_conv_9x9'", *ALL_PRIMITIVES],
    ),
    "edge from a later node": (
        edited(normal=[["conv_3x3", 3, 2], ["null", 0, 3]]),
        ["normal cell", "3->2", "conv_3x3", "0..1"],
    ),
    "edge from its own node": (edited(normal=[["conv_3x3", 2, 2]]), ["2->2", "0..1"]),
    "edge from a negative node": (edited(normal=[["conv_3x3", -1, 2]]), ["-1->2", "0..1"]),
    "edge into an input": (
        edited(normal=[["conv_3x3", 0, 1], ["conv_3x3", 0, 2]]),
        ["normal cell", "0->1", "start at 2"],
    ),
    "node without input": (
        edited(normal=[["conv_3x3", 0, 2], ["conv_3x3", 0, 4]]),
        ["normal cell", "node 3", "2..4"],
    ),
    "concat of an input": (edited(reduce_concat=[1]), ["reduce cell", "node 1", "2..2"]),
    "concat of a node too high": (edited(normal_concat=[2, 4]), ["normal cell", "node 4", "2..3"]),
    "concat twice": (edited(normal_concat=[3, 2, 3]), ["normal cell", "(3, 2, 3)", "twice"]),
    "empty concat": (edited(normal_concat=[]), ["normal cell", "concat is empty"]),
    "concat of no numbers": (edited(normal_concat=["2"]), ["normal cell", "['2']"]),
    "concat of truth values": (edited(normal_concat=[True]), ["[True]"]),
    "concat that is no list": (edited(normal_concat=2), ["normal cell", "lists"]),
    "no edges": (edited(reduce=[]), ["reduce cell", "at least one edge"]),
    "edges that are no list": (edited(reduce="null"), ["reduce cell", "lists"]),
    "pair in JSON": (edited(normal=[["null", 0]]), ["['null', 0]", "[primitive, source, target]"]),
    "edge the wrong way round": (
        edited(normal=[[0, 2, "null"]]),
        ["[0, 2, 'null']", "[primitive, source, target]"],
    ),
    "edge of fractions": (edited(normal=[["null", 0.5, 2]]), ["['null', 0.5, 2]"]),
    "edge of truth values": (edited(normal=[["null", True, 2]]), ["['null', True, 2]"]),
    "edge that is a word": (edited(normal=["null"]), ["'null'"]),
    "missing key": ({k: v for k, v in SMALL.items() if k != "reduce"}, ["lacks ['reduce']"]),
    "unknown key": (edited(normall=[]), ["['normall']", "'normal_concat'"]),
    "no mapping": ([SMALL], ["mapping", "list"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_genotypes_are_refused_with_the_value_and_what_is_allowed(case: str) -> None:
    value, said = BAD[case]
    with pytest.raises(NatlibError) as error:
        Genotype.from_json(value)
    for text in said:
        assert text in str(error.value)
    with pytest.raises(NatlibError) as again:
        parse(json.dumps(value))
    assert str(again.value) == str(error.value)


def test_bad_literals_are_refused_like_bad_json() -> None:
    rest = "reduce=[('null', 0)], reduce_concat=[2])"
    for text, said in {
        f"Genotype(normal=[('sep_conv_9x9', 0)], normal_concat=[2], {rest}": "'sep_conv_9x9'",
        f"Genotype(normal=[('null', 2)], normal_concat=[2], {rest}": "2->2",
        f"Genotype(normal=[('null', -1)], normal_concat=[2], {rest}": "-1->2",
        f"Genotype(normal=[('null', 0)], normal_concat=range(2, 6), {rest}": "node 3",
        f"Genotype(normal=[('null', 0)], normal_concat=[2], more=1, {rest}": "['more']",
        f"Genotype(normal=[(0, 'null')], normal_concat=[2], {rest}": "[0, 'null', 2]",
        f"Genotype(normal=[('null', source)], normal_concat=[2], {rest}": "'source'",
    }.items():
        with pytest.raises(NatlibError) as error:
            parse(text)
        assert said in str(error.value)


def test_cells_built_in_code_are_checked_too() -> None:
    with pytest.raises(NatlibError, match="3->2"):
        Cell((Edge(3, 2, "null"),), (2,))
    with pytest.raises(NatlibError, match="at least one edge"):
        Cell((), (2,))


# --- fingerprint ------------------------------------------------------------------------------


def relabelled(cell: Cell, order: list[int]) -> Cell | None:
    """Give intermediate node ``order[i]`` the number i + 2; None where an edge would go back."""
    label = {0: 0, 1: 1} | {n: i + INPUTS for i, n in enumerate(order)}
    edges = tuple(Edge(label[e.source], label[e.target], e.primitive) for e in cell.edges)
    if any(e.source >= e.target for e in edges):
        return None
    return Cell(edges, tuple(label[n] for n in cell.concat))


@given(cells(ALL_PRIMITIVES, degrees=(1, 2, 3)), st.randoms(use_true_random=False))
def test_fingerprint_ignores_the_order_of_edges_and_of_concat(
    cell: Cell, draw: random.Random
) -> None:
    edges, concat = list(cell.edges), list(cell.concat)
    draw.shuffle(edges)
    draw.shuffle(concat)
    assert Cell(tuple(edges), tuple(concat)).fingerprint() == cell.fingerprint()


@given(cells(PRIMITIVES, nodes=(2, 3, 4)))
@example(
    # Two alike nodes, read by two alike nodes: only together may they change places.
    Cell(
        (
            Edge(0, 2, "conv_1x1"),
            Edge(0, 3, "conv_1x1"),
            Edge(2, 4, "skip_connect"),
            Edge(3, 5, "skip_connect"),
        ),
        (2, 3, 4, 5),
    )
)
def test_fingerprint_ignores_the_numbers_of_nodes(cell: Cell) -> None:
    others = [
        other
        for order in permutations(range(INPUTS, INPUTS + cell.nodes))
        if (other := relabelled(cell, list(order)))
    ]
    assert {other.fingerprint() for other in others} == {cell.fingerprint()}


@given(cells(PRIMITIVES, nodes=(1, 2, 3)), st.data())
def test_fingerprint_ignores_what_does_not_reach_the_output(
    cell: Cell, data: st.DataObject
) -> None:
    base = cell.fingerprint()
    last = cell.nodes + INPUTS - 1
    names = st.sampled_from(PRIMITIVES)
    source = data.draw(st.integers(0, last))
    dead = Edge(source, last + 1, data.draw(names))
    assert Cell((*cell.edges, dead), cell.concat).fingerprint() == base
    target = data.draw(st.integers(INPUTS, last))
    null = Edge(data.draw(st.integers(0, target - 1)), target, "null")
    assert Cell((*cell.edges, null), cell.concat).fingerprint() == base
    edges = tuple(
        e if e.target in cell.live else Edge(e.source, e.target, data.draw(names))
        for e in cell.edges
    )
    assert Cell(edges, cell.concat).fingerprint() == base


def core(cell: Cell) -> tuple[list[tuple[int, int, str]], set[int], list[int]]:
    """Edges, concat and intermediate nodes that matter, found by walking paths from the output."""
    nodes, todo = set(cell.concat), list(cell.concat)
    while todo:
        node = todo.pop()
        for e in cell.edges:
            if e.target == node and e.primitive != "null" and e.source not in nodes:
                nodes.add(e.source)
                todo.append(e.source)
    edges = [
        (e.source, e.target, e.primitive)
        for e in cell.edges
        if e.target in nodes and e.primitive != "null"
    ]
    return edges, set(cell.concat), [n for n in nodes if n >= INPUTS]


def same_computation(a: Cell, b: Cell) -> bool:
    """Try every bijection of the nodes that matter."""
    edges_a, concat_a, nodes_a = core(a)
    edges_b, concat_b, nodes_b = core(b)
    if len(nodes_a) != len(nodes_b):
        return False
    for order in permutations(nodes_b):
        label = {0: 0, 1: 1, **dict(zip(nodes_a, order, strict=True))}
        renamed = sorted((label[s], label[t], p) for s, t, p in edges_a)
        if renamed == sorted(edges_b) and {label[n] for n in concat_a} == concat_b:
            return True
    return False


few = cells(("skip_connect", "conv_1x1", "null"), nodes=(1, 2, 3), degrees=(1, 2))


@given(few, few)
@example(
    # Node 2 is zero, but node 3 reads it: it must be counted, and the other's must not.
    Cell((Edge(0, 2, "null"), Edge(2, 3, "conv_1x1"), Edge(0, 3, "conv_1x1")), (3,)),
    Cell((Edge(0, 2, "null"), Edge(0, 3, "conv_1x1")), (3,)),
)
@example(
    # One node with two equal inputs, or two nodes alike: not the same sum.
    Cell((Edge(0, 2, "conv_1x1"), Edge(2, 3, "skip_connect"), Edge(2, 3, "skip_connect")), (3,)),
    Cell(
        (
            Edge(0, 2, "conv_1x1"),
            Edge(0, 3, "conv_1x1"),
            Edge(2, 4, "skip_connect"),
            Edge(3, 4, "skip_connect"),
        ),
        (4,),
    ),
)
@example(
    # Alike from above and below in number and kind, but wired in another way.
    Cell(tuple(Edge(s, t, "null" if s == 1 else "conv_1x1") for s, t in [(0, 2), (1, 2)]), (2,)),
    Cell(tuple(Edge(s, t, "null" if s == 0 else "conv_1x1") for s, t in [(0, 2), (1, 2)]), (2,)),
)
def test_fingerprint_is_equal_exactly_for_the_same_computation(a: Cell, b: Cell) -> None:
    assert (a.fingerprint() == b.fingerprint()) == same_computation(a, b)


def test_fingerprint_tells_wirings_apart_that_look_alike_locally() -> None:
    def crossed(*sources: int) -> Cell:
        ends = zip(sources, (4, 4, 5, 5, 6, 6, 7, 7), strict=True)
        first = [Edge(0, 2, "conv_1x1"), Edge(0, 3, "conv_1x1")]
        return Cell((*first, *(Edge(s, t, "skip_connect") for s, t in ends)), (4, 5, 6, 7))

    # Each of nodes 2 and 3 has four readers; 4..7 have two inputs: paired once, mixed once.
    mixed = crossed(2, 3, 2, 3, 2, 3, 2, 3)
    paired = crossed(2, 2, 3, 3, 2, 2, 3, 3)
    half = crossed(2, 2, 3, 3, 2, 3, 2, 3)
    assert len({c.fingerprint() for c in (mixed, paired, half)}) == 3


@given(cells(PRIMITIVES), st.data())
def test_fingerprint_changes_with_a_live_primitive(cell: Cell, data: st.DataObject) -> None:
    live = [i for i, e in enumerate(cell.edges) if e.target in cell.live and e.primitive != "null"]
    assume(live)
    at = data.draw(st.sampled_from(live))
    names = [e.primitive for e in cell.edges]
    names[at] = data.draw(st.sampled_from([p for p in PRIMITIVES if p not in ("null", names[at])]))
    assert cell.with_primitives(names).fingerprint() != cell.fingerprint()


@given(any_genotypes())
def test_fingerprint_of_a_genotype_depends_on_both_cells_and_their_places(g: Genotype) -> None:
    assert len(g.fingerprint()) == 16
    assert Genotype.from_json(g.to_json()).fingerprint() == g.fingerprint()
    if g.normal.fingerprint() != g.reduce.fingerprint():
        assert Genotype(g.reduce, g.normal).fingerprint() != g.fingerprint()
        assert Genotype(g.normal, g.normal).fingerprint() != g.fingerprint()


def test_published_genotypes_differ_except_where_published_twice() -> None:
    groups: dict[str, list[str]] = {}
    for name, genotype in ZOO.items():
        groups.setdefault(genotype.fingerprint(), []).append(name)
    equal = sorted(names for names in groups.values() if len(names) > 1)
    assert equal == [["NAT_MobileNetv2", "NATv2_MobileNetv2"]]


# --- NAS-Bench-201 strings ---------------------------------------------------------------------

# The best of the benchmark on CIFAR-10.
BEST_201 = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+"
    "|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
)


def test_a_nasbench201_string_as_a_genotype() -> None:
    genotype = parse(BEST_201 + "\n")
    assert genotype.normal == genotype.reduce
    assert genotype.normal == Cell(
        (
            Edge(1, 2, "conv_3x3"), Edge(1, 3, "conv_3x3"), Edge(2, 3, "conv_3x3"),
            Edge(1, 4, "skip_connect"), Edge(2, 4, "conv_3x3"), Edge(3, 4, "conv_1x1"),
        ),
        (4,),
    )  # fmt: skip
    assert format_nasbench201(genotype) == BEST_201


@given(st.lists(st.sampled_from(list(NASBENCH201)), min_size=6, max_size=6))
def test_nasbench201_strings_round_trip(names: list[str]) -> None:
    draw = iter(names)
    text = "+".join("|" + "".join(f"{next(draw)}~{s}|" for s in range(n)) for n in (1, 2, 3))
    genotype = parse_nasbench201(text)
    assert format_nasbench201(genotype) == text
    assert [NASBENCH201[n] for n in names] == [e.primitive for e in genotype.normal.edges]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|none~0|+|none~0|", r"'\|none~0\|' is not node 2 .* needs 2"),
        ("|none~0", r"'\|none~0' is not node 1"),
        ("|none~0|none~1|", "is not node 1"),
        ("|conv_3x3~0|", r"unknown primitive 'conv_3x3'.*nor_conv_3x3"),
        ("|none~1|", r"'none~1' in '\|none~1\|' should come from node 0"),
        ("|none|", "'none' in '.none.' should come from node 0"),
    ],
)
def test_faulty_nasbench201_strings(text: str, message: str) -> None:
    with pytest.raises(NatlibError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        (ZOO["DARTS"], "node 2 has edges from"),
        (parse("|none~0|").with_primitives(["conv_5x5"] * 2), "'conv_5x5' is not in"),
        (parse("|none~0|").with_primitives(["null", "conv_1x1"]), "are the same"),
    ],
)
def test_what_no_nasbench201_string_describes(genotype: Genotype, message: str) -> None:
    with pytest.raises(NatlibError, match=message):
        format_nasbench201(genotype)


def test_a_file_that_cannot_be_read_as_text_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text("{}", "utf-16")
    with pytest.raises(NatlibError, match=r"cell\.json is not text in UTF-8"):
        read(tmp_path / "cell.json")
    with pytest.raises(NatlibError, match=r"cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(NatlibError, match=r"there is no file .*none\.json"):
        read(tmp_path / "none.json")
