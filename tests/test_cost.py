from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from natlib.cost import Cost, cell_cost, network_cost
from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import ImageNetMacro, MacroConfig
from natlib.network import CellNetwork, parameter_count
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES
from natlib.zoo import ZOO
from tests.strategies import all_runs, any_genotypes, chain, genotypes, macros, run_counting

GOLDEN = Path(__file__).parent / "golden" / "network_costs.csv"
ROWS = list(csv.DictReader(GOLDEN.open()))


@pytest.mark.parametrize("row", ROWS, ids=[row["genotype"] for row in ROWS])
def test_network_cost_equals_the_recorded_one(row: dict[str, str]) -> None:
    channels, side, width = map(int, row["input"].split("x"))
    assert side == width
    macro = MacroConfig(
        int(row["channels"]), int(row["cells"]), image_size=side, image_channels=channels
    )
    expected = Cost(int(row["params"]), int(row["madds"]))
    assert network_cost(ZOO[row["genotype"]], macro) == expected


PUBLISHED = {"CIFAR-10": MacroConfig(36, 20), "ImageNet": ImageNetMacro(48, 14)}
ZOO_ROWS = list(csv.DictReader((GOLDEN.parent / "zoo_costs.csv").open()))


def test_the_golden_file_has_every_genotype_in_both_networks() -> None:
    assert [(r["genotype"], r["dataset"]) for r in ZOO_ROWS] == [
        (n, d) for n in ZOO for d in PUBLISHED
    ]


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_costs_of_the_zoo_equal_the_recorded_ones(dataset: str) -> None:
    macro = PUBLISHED[dataset]
    found = {n: network_cost(g, macro) for n, g in ZOO.items()}
    recorded = {
        r["genotype"]: Cost(int(r["params"]), int(r["madds"]))
        for r in ZOO_ROWS
        if r["dataset"] == dataset
    }
    assert found == recorded


@pytest.mark.parametrize("name", ZOO)
def test_formula_is_what_a_published_genotype_computes_on_imagenet(name: str) -> None:
    macro = ImageNetMacro(48, 5)
    found, formula = counted(ZOO[name], macro), network_cost(ZOO[name], macro)
    assert found.params == formula.params
    assert found.madds == formula.madds if all_runs(ZOO[name]) else found.madds < formula.madds


def test_the_published_supernet_has_15_024_550_parameters() -> None:
    network = CellNetwork(MacroConfig(20, 8), nodes=4, primitives=PRIMITIVES, device="meta")
    assert parameter_count(network.parameters()) == 15_024_550


def counted(genotype: Genotype, macro: MacroConfig | ImageNetMacro) -> Cost:
    """Count parameters and the multiply-adds of a run on the meta device, pooling left out."""
    network = CellNetwork(macro, genotype=genotype, device="meta")
    image = torch.empty(2, macro.image_channels, macro.image_size, macro.image_size, device="meta")
    return Cost(parameter_count(network.parameters()), run_counting(network, image)[1])


@given(any_genotypes(), macros)
@settings(max_examples=25)
def test_formula_is_what_a_network_holds_and_at_least_what_it_computes(
    genotype: Genotype, macro: MacroConfig
) -> None:
    formula, network = network_cost(genotype, macro), counted(genotype, macro)
    assert formula.params == network.params
    assert network.madds <= formula.madds
    if all_runs(genotype):
        assert network.madds == formula.madds


@given(genotypes(ALL_PRIMITIVES, nodes=(2, 3, 4), degrees=(2, 3), concat="all"), macros)
@settings(max_examples=25)
def test_formula_is_what_a_network_computes_where_all_of_it_is_live(
    genotype: Genotype, macro: MacroConfig
) -> None:
    # Add an edge from each input, so that nothing can be left out.
    live = Genotype(
        *(
            Cell(tuple([*c.edges, Edge(0, 2, "conv_1x1"), Edge(1, 2, "skip_connect")]), c.concat)
            for _, c in genotype.cells
        )
    )
    assert all_runs(live)
    assert counted(live, macro) == network_cost(live, macro)


@pytest.mark.parametrize("name", ALL_PRIMITIVES)
def test_formula_of_each_primitive_in_a_network(name: str) -> None:
    for other in ("conv_3x3", name):
        cell = chain(name, "conv_1x1", other)
        macro = MacroConfig(10, 6, image_size=16)
        genotype = Genotype(cell, cell)
        found = counted(genotype, macro)
        assert found.params == network_cost(genotype, macro).params
        if name != "null":
            assert found == network_cost(genotype, macro)


@given(any_genotypes(), macros)
def test_a_network_costs_its_cells_and_what_joins_them(
    genotype: Genotype, macro: MacroConfig
) -> None:
    nulls = genotype.with_primitives(["null"] * len(genotype.primitives))
    cells = Cost()
    for place in macro.positions():
        cells += cell_cost(genotype.reduce if place.kind == "reduce" else genotype.normal, place)
    assert network_cost(genotype, macro) == network_cost(nulls, macro) + cells


def test_a_network_worked_out_by_hand() -> None:
    # One reduction cell of one node: stem 3 -> 4, inputs 4 -> 8 twice, skip at stride 2, linear.
    cell = Cell((Edge(0, 2, "skip_connect"),), (2,))
    macro = MacroConfig(channels=4, cells=1, classes=5, image_size=8, image_channels=3, stem=1)
    stem, inputs, skip, linear = 27 * 4, 4 * 8, 8 * 8, 8 * 5
    params = (stem + 2 * 4) + 2 * (inputs + 2 * 8) + (skip + 2 * 8) + (linear + 5)
    madds = stem * 64 + 2 * inputs * 64 + skip * 16 + linear
    assert network_cost(Genotype(cell, cell), macro) == Cost(params, madds)


def test_costs_do_not_depend_on_what_was_asked_before() -> None:
    one, two = MacroConfig(16, 5), MacroConfig(18, 5)
    first = network_cost(ZOO["DARTS"], one)
    assert network_cost(ZOO["DARTS"], two) != first
    assert network_cost(ZOO["DARTS"], one) == first
