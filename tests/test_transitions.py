from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natlib import NatlibError
from natlib.cost import edge_cost, network_cost
from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import MacroConfig
from natlib.primitives import ALL_PRIMITIVES, NAT_PRIMITIVES, PRIMITIVES, primitive
from natlib.transitions import (
    RULES,
    STRIDES,
    by_name,
    edge_stride,
    nat,
    natpp,
    natpp_cost_safe,
    raises_cost,
)
from natlib.zoo import ZOO
from tests.strategies import genotypes, macros
from tests.test_zoo import ORIGINALS

GOLDEN = Path(__file__).parent / "golden" / "natpp_pairs.csv"
PUBLISHED = {
    (row["source"], target)
    for row in csv.DictReader(GOLDEN.open())
    for target in row["targets"].split()
} | {(name, name) for name in PRIMITIVES}
POOLS = [n for n in PRIMITIVES if primitive(n).kind in ("max_pool", "avg_pool")]


# --- the published rules ----------------------------------------------------------------------


def test_natpp_allows_the_77_published_pairs_at_either_stride() -> None:
    assert len(PUBLISHED) == 77
    for stride in STRIDES:
        assert natpp().pairs(stride) == PUBLISHED


def test_natpp_over_fewer_primitives_is_the_same_rule() -> None:
    assert natpp(NAT_PRIMITIVES).pairs() == {
        (s, t) for s, t in PUBLISHED if s in NAT_PRIMITIVES and t in NAT_PRIMITIVES
    }


@pytest.mark.parametrize(("names", "count"), [(PRIMITIVES, 37), (NAT_PRIMITIVES, 25)])
def test_nat_keeps_or_goes_to_skip_or_null(names: tuple[str, ...], count: int) -> None:
    allowed = {(n, n) for n in names}
    allowed |= {(n, "skip_connect") for n in names} | {(n, "null") for n in names}
    assert len(allowed) == count
    for stride in STRIDES:
        assert nat(names).pairs(stride) == allowed


def test_nat_is_part_of_natpp() -> None:
    assert nat().pairs() < natpp().pairs()


# --- the cost-safe rule -----------------------------------------------------------------------


def test_what_natpp_makes_dearer_is_pool_or_null_to_skip_at_stride_2() -> None:
    assert natpp().pairs(1) - natpp_cost_safe().pairs(1) == set()
    raised = natpp().pairs(2) - natpp_cost_safe().pairs(2)
    assert raised == {(pool, "skip_connect") for pool in POOLS} | {("null", "skip_connect")}


def test_what_cost_safe_adds_costs_no_more_and_holds_the_known_omission() -> None:
    for stride in STRIDES:
        added = natpp_cost_safe().pairs(stride) - natpp().pairs(stride)
        for source in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"):
            assert (source, "conv_1x1") in added
        for s, t in added:
            for c, size in product((8, 9, 16, 100, 2048), (4, 8, 32)):
                before, after = (primitive(n).cost(c, size, stride) for n in (s, t))
                assert after.within(before), (s, t, stride, c)


@pytest.mark.parametrize("stride", STRIDES)
def test_cost_safe_never_makes_an_edge_dearer_and_forbids_nothing_of_natpp_that_does_not(
    stride: int,
) -> None:
    rule = natpp_cost_safe(ALL_PRIMITIVES)
    for s, t in product(ALL_PRIMITIVES, repeat=2):
        dearer = [
            (c, size)
            for c in (*range(8, 40), 100, 1000, 4096)
            for size in (2, 4, 8, 32)
            if not edge_cost(primitive(t), c, size, stride).within(
                edge_cost(primitive(s), c, size, stride)
            )
        ]
        assert raises_cost(primitive(s), primitive(t), stride) == bool(dearer), (s, t)
        if rule.allows(s, t, stride):
            assert not dearer, (s, t, dearer[:3])
        elif natpp(ALL_PRIMITIVES).allows(s, t, stride):
            assert dearer, (s, t)


NAONETS = {
    "conv_1x7_7x1": {
        "conv_7x1_1x7", "conv_5x5", "conv_3x3", "conv_1x3_3x1", "conv_1x1", "sep_conv_5x5",
        "sep_conv_3x3", "dil_conv_5x5", "dil_conv_3x3", "max_pool_5x5", "avg_pool_5x5",
        "max_pool_3x3", "avg_pool_3x3", "max_pool_2x2", "avg_pool_2x2", "skip_connect", "null",
    },
    "conv_1x3_3x1": {
        "conv_3x3", "conv_1x1", "sep_conv_3x3", "dil_conv_3x3", "max_pool_3x3", "avg_pool_3x3",
        "max_pool_2x2", "avg_pool_2x2", "skip_connect", "null",
    },
    "avg_pool_2x2": {"max_pool_2x2", "skip_connect", "null"},
    "max_pool_2x2": {"avg_pool_2x2", "skip_connect", "null"},
}  # fmt: skip
"""What may take the place of NAONet's own primitives: a kernel counts by its longer side."""


def test_what_holds_for_naonets_primitives() -> None:
    rule, safe = natpp(ALL_PRIMITIVES), natpp_cost_safe(ALL_PRIMITIVES)
    dearer = {
        ("conv_1x3_3x1", "conv_3x3"), ("conv_1x7_7x1", "conv_5x5"), ("conv_7x1_1x7", "conv_5x5"),
    }  # fmt: skip
    cheaper = {("conv_5x5", "conv_1x7_7x1"), ("conv_5x5", "conv_7x1_1x7")}
    for stride in STRIDES:
        pairs = rule.pairs(stride)
        assert len(pairs) == 154
        for source, targets in NAONETS.items():
            assert {t for s, t in pairs if s == source} == targets | {source}
        # A factorized convolution is cheaper than the square one of a shorter side.
        raising = {p for p in pairs if raises_cost(primitive(p[0]), primitive(p[1]), stride)}
        assert {(s, t) for s, t in raising if t != "skip_connect"} == dearer
        assert not dearer & safe.pairs(stride)
        assert not cheaper & pairs and cheaper <= safe.pairs(stride)
    # NAT keeps, or goes to skip or null, whatever the primitive.
    for name in NAONETS:
        assert {t for s, t in nat(ALL_PRIMITIVES).pairs() if s == name} == {
            name, "skip_connect", "null"
        }  # fmt: skip


@given(genotypes(ALL_PRIMITIVES, degrees=(1, 2, 3)), macros, st.data())
def test_cost_safe_rewritings_never_cost_more(
    genotype: Genotype, macro: MacroConfig, data: st.DataObject
) -> None:
    rule = natpp_cost_safe(ALL_PRIMITIVES)
    names = []
    for kind, cell in genotype.cells:
        for e in cell.edges:
            stride = edge_stride(e.source, kind)
            allowed = [t for t in ALL_PRIMITIVES if rule.allows(e.primitive, t, stride)]
            names.append(data.draw(st.sampled_from(allowed)))
    after = genotype.with_primitives(names)
    assert network_cost(after, macro).within(network_cost(genotype, macro))


def test_null_to_skip_at_stride_2_shows_the_published_rules_are_not_cost_safe() -> None:
    cell = Cell((Edge(0, 2, "null"), Edge(1, 2, "conv_1x1")), (2,))
    before = Genotype(cell, cell)
    after = Genotype(cell, cell.with_primitives(["skip_connect", "conv_1x1"]))
    macro = MacroConfig(16, 3)
    for rule in (nat(), natpp()):
        assert rule.violations(before, after) == []
    assert not network_cost(after, macro).within(network_cost(before, macro))
    assert [v[0] for v in natpp_cost_safe().violations(before, after)] == ["reduce"]


# --- all rules --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_staying_put_is_always_allowed(name: str) -> None:
    rule = by_name(name, ALL_PRIMITIVES)
    for stride, p in product(STRIDES, ALL_PRIMITIVES):
        assert rule.allows(p, p, stride)
    assert bool(rule.mask().diagonal(dim1=1, dim2=2).all())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("names", [PRIMITIVES, NAT_PRIMITIVES, ALL_PRIMITIVES, PRIMITIVES[::-1]])
def test_mask_is_the_rule_as_a_tensor(name: str, names: tuple[str, ...]) -> None:
    rule = by_name(name, names)
    mask = rule.mask()
    assert mask.dtype == torch.bool
    assert mask.shape == (2, len(names), len(names))
    for stride in STRIDES:
        rows, columns = mask[stride - 1].nonzero(as_tuple=True)
        pairs = {(names[r], names[c]) for r, c in zip(rows, columns, strict=True)}
        assert pairs == rule.pairs(stride)


def test_only_cost_safe_depends_on_the_stride() -> None:
    differs = {name: bool((by_name(name).mask().diff(dim=0)).any()) for name in RULES}
    assert differs == {"nat": False, "natpp": False, "natpp_cost_safe": True}


def test_stride_is_2_only_from_the_inputs_of_a_reduction_cell() -> None:
    found = {(s, kind): edge_stride(s, kind) for s in range(4) for kind in ("normal", "reduce")}
    assert {key for key, stride in found.items() if stride == 2} == {(0, "reduce"), (1, "reduce")}
    assert set(found.values()) == {1, 2}


# --- the published rewritings -----------------------------------------------------------------


def audit() -> dict[str, list[tuple[str, str, str]]]:
    found = {}
    for name, after in ZOO.items():
        prefix, _, base = name.partition("_")
        if prefix in ("NAT", "NATv2"):
            rule = nat() if prefix == "NAT" else natpp()
            broken = rule.violations(ZOO[ORIGINALS[base]], after)
            found[name] = [(cell, a.primitive, b.primitive) for cell, a, b in broken]
    return found


def test_only_naonets_published_rewritings_break_the_rules() -> None:
    found = audit()
    assert len(found) == 17
    assert {name: edges for name, edges in found.items() if edges} == {
        "NAT_NAONet": [("reduce", "avg_pool_2x2", "avg_pool_3x3")],
        "NATv2_NAONet": [
            ("normal", "conv_1x1", "max_pool_3x3"),
            ("reduce", "conv_1x1", "avg_pool_3x3"),
        ],
    }


def test_published_rewritings_that_cost_more_than_their_input() -> None:
    macro = MacroConfig(36, 20)
    dearer = {
        name
        for name, after in ZOO.items()
        if "_" in name
        and not network_cost(after, macro).within(
            network_cost(ZOO[ORIGINALS[name.partition("_")[2]]], macro)
        )
    }
    assert {"NAT_ResBlock", "NAT_VGG", "NAT_MobileNetv2"} <= dearer
    for name in dearer - {"NAT_NAONet", "NATv2_NAONet"}:
        before = ZOO[ORIGINALS[name.partition("_")[2]]]
        assert natpp_cost_safe().violations(before, ZOO[name]), name


def test_violations_names_the_edges_before_and_after() -> None:
    cell = Cell((Edge(0, 2, "conv_1x1"), Edge(1, 2, "skip_connect")), (2,))
    before = Genotype(cell, cell)
    after = Genotype(cell, cell.with_primitives(["conv_3x3", "null"]))
    assert natpp().violations(before, after) == [
        ("reduce", Edge(0, 2, "conv_1x1"), Edge(0, 2, "conv_3x3"))
    ]
    assert natpp().violations(before, before) == []


def test_violations_needs_the_same_graph() -> None:
    def one(source: int, concat: tuple[int, ...] = (2,)) -> Genotype:
        edges = (Edge(source, 2, "null"), Edge(0, 3, "null"))
        return Genotype(Cell(edges, (2,)), Cell(edges, concat))

    with pytest.raises(NatlibError, match="normal cells are not the same graph"):
        natpp().violations(one(0), one(1))
    with pytest.raises(NatlibError, match="reduce cells are not the same graph"):
        natpp().violations(one(0), one(0, (3,)))


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_named_with_what_is_allowed() -> None:
    with pytest.raises(NatlibError) as error:
        by_name("nat++")
    assert "'nat++'" in str(error.value)
    assert all(name in str(error.value) for name in RULES)
    for pair in (("conv_9x9", "null"), ("null", "conv_9x9")):
        with pytest.raises(NatlibError) as error:
            natpp().allows(*pair)
        assert "'conv_9x9'" in str(error.value)
        assert all(name in str(error.value) for name in PRIMITIVES)
    with pytest.raises(NatlibError, match="conv_5x5"):
        nat(NAT_PRIMITIVES).allows("conv_5x5", "null")
    for stride in (0, 3):
        with pytest.raises(NatlibError, match=rf"stride {stride} .*\(1, 2\)"):
            natpp().allows("null", "null", stride)
