"""No derived architecture exceeds its budget, whatever the rule, the network and the stride."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natlib import NatlibError, budget
from natlib.budget import Budget
from natlib.cost import Cost, network_cost
from natlib.genotype import Cell, Genotype
from natlib.handcrafted import MACROS, ORIGINALS
from natlib.macro import BlockMacro, ImageNetMacro, Macro, MacroConfig
from natlib.network import CellNetwork, parameter_count
from natlib.primitives import PRIMITIVES
from natlib.records import as_json
from natlib.search import DeriveConfig, SpaceConfig, SupernetConfig, derive, random_policy
from natlib.transitions import RULES
from natlib.zoo import ZOO
from tests.made import DATA
from tests.strategies import generator, genotypes, luck, lucks
from tests.strategies import macros as small_macros

SMALL = MacroConfig(channels=4, cells=3, image_size=8)


def last_node_only(genotype: Genotype) -> Genotype:
    return Genotype(*(Cell(c.edges, (c.nodes + 1,)) for _, c in genotype.cells))


any_macro: st.SearchStrategy[Macro] = st.one_of(
    small_macros,
    st.just(ImageNetMacro(8, 5, image_size=64)),
    st.sampled_from(list(MACROS.values())),
)
limits = st.one_of(st.none(), st.floats(0, 1.3))


def slow(
    networks: Mapping[Any, tuple[Genotype, Macro]], rounds: int, passes: int
) -> dict[Any, float]:
    """Latencies that anyone can compute: a millisecond for each million MAdds."""
    return {name: network_cost(*n).madds / 1e6 for name, n in networks.items()}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    genotypes(PRIMITIVES, nodes=(3, 4, 5)), st.sampled_from(sorted(RULES)), any_macro,
    limits, limits, limits, st.integers(0, 2**32),
)  # fmt: skip
def test_no_derived_architecture_exceeds_its_budget(
    monkeypatch: pytest.MonkeyPatch, genotype: Genotype, rule: str, macro: Macro,
    params: float | None, madds: float | None, latency: float | None, seed: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(budget, "latencies", slow)
    if isinstance(macro, BlockMacro):
        genotype = last_node_only(genotype)
    whole = network_cost(genotype, macro)
    limit = Budget(
        None if params is None else int(params * whole.params),
        None if madds is None else int(madds * whole.madds),
        None if latency is None else latency * whole.madds / 1e6,
    )
    policy = random_policy(rule, SpaceConfig())
    drawn = {genotype, *policy.sample([genotype] * 8, generator(seed)).genotypes}
    costs = {g: network_cost(g, macro) for g in drawn}
    fits = {
        g
        for g, c in costs.items()
        if (limit.params is None or c.params <= limit.params)
        and (limit.madds is None or c.madds <= limit.madds)
        and (limit.latency_ms is None or c.madds / 1e6 <= limit.latency_ms)
    }
    if not fits:
        with pytest.raises(NatlibError, match="none of"):
            derive(policy, genotype, 8, lucks, macro, generator(seed), limit)
        return
    found = derive(policy, genotype, 8, lucks, macro, generator(seed), limit)
    assert found.genotype in fits
    assert {g for g, _ in found.candidates} == fits
    assert found.dropped == len(drawn) - len(fits)
    assert found.score == max(luck(g) for g in fits)


@settings(max_examples=40)
@given(
    genotypes(PRIMITIVES, nodes=(3, 4)), st.sampled_from(sorted(RULES)),
    st.sampled_from(list(MACROS.values())), st.integers(0, 2**32),
)  # fmt: skip
def test_a_hand_crafted_network_keeps_its_inputs_cost_where_the_rule_alone_would_not(
    genotype: Genotype, rule: str, macro: BlockMacro, seed: int
) -> None:
    genotype = last_node_only(genotype)
    policy = random_policy(rule, SpaceConfig())
    found = derive(policy, genotype, 8, lucks, macro, generator(seed))
    assert network_cost(found.genotype, macro).within(network_cost(genotype, macro))


@pytest.mark.parametrize(("name", "dataset"), MACROS)
def test_every_hand_crafted_network_can_be_transformed(name: str, dataset: str) -> None:
    macro, before = MACROS[name, dataset], ORIGINALS[name]
    policy = random_policy("natpp", SpaceConfig())
    found = derive(policy, before, 40, lucks, macro, generator())
    assert any(g != before for g, _ in found.candidates)
    for genotype, _ in found.candidates[:3]:
        network = CellNetwork(macro, genotype=genotype, device="meta")
        assert parameter_count(network.parameters()) == network_cost(genotype, macro).params


def test_a_cost_is_the_budget_of_its_params_and_madds() -> None:
    cost = network_cost(ZOO["DARTS"], SMALL)
    assert Budget.of(cost) == Budget(cost.params, cost.madds)
    assert Budget.of(cost).allows(ZOO["DARTS"], SMALL)
    assert not Budget.of(Cost(cost.params - 1, cost.madds)).allows(ZOO["DARTS"], SMALL)
    assert not Budget.of(Cost(cost.params, cost.madds - 1)).allows(ZOO["DARTS"], SMALL)
    assert Budget().allows(ZOO["DARTS"], SMALL)


def test_latency_is_measured_and_only_where_all_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Budget(latency_ms=1e6).allows(ZOO["DARTS"], SMALL)
    assert not Budget(latency_ms=0).allows(ZOO["DARTS"], SMALL)
    monkeypatch.setattr(budget, "latencies", None)
    assert not Budget(params=0, latency_ms=1e6).allows(ZOO["DARTS"], SMALL)


@pytest.mark.parametrize("name", ["params", "madds", "latency_ms"])
@pytest.mark.parametrize("bad", [-1, float("nan"), "10"])
def test_limits_that_are_none_are_named(name: str, bad: Any) -> None:
    with pytest.raises(NatlibError) as error:
        Budget(**{name: bad})
    assert f"{name} = {bad!r}" in str(error.value)


def test_derivations_without_budget_keep_their_keys() -> None:
    supernet = SupernetConfig(DATA, SMALL, SpaceConfig((4,)), seed=0, epochs=1)
    plain = DeriveConfig(supernet, "", (), (), 3, 0)
    limited = DeriveConfig(supernet, "", (), (), 3, 0, Budget(params=10))
    assert "budget" not in as_json(plain)
    assert as_json(limited)["budget"]["params"] == 10
