from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natlib import NatlibError, nasbench201, natbench, tabular
from natlib.tabular import KINDS, attribute, kind_of
from natlib.transitions import RULES, by_name
from tests.strategies import generator
from tests.tables import natbench_table, small_space

SMALL = small_space()
codes = st.integers(0, SMALL.size - 1)
rules = st.sampled_from(list(RULES))


@pytest.fixture
def made_natbench(monkeypatch: pytest.MonkeyPatch) -> tabular.Space:
    monkeypatch.setattr(natbench, "load", natbench_table)
    return tabular.from_natbench()


def test_a_code_holds_the_primitives_as_digits() -> None:
    everything = np.arange(SMALL.size)
    assert SMALL.digits(everything).tolist()[27] == [1, 2, 3]
    assert SMALL.codes(SMALL.digits(everything)).tolist() == everything.tolist()


def test_codes_and_genotypes_are_one_to_one(made_natbench: tabular.Space) -> None:
    for code in range(0, natbench.SIZE, 91):
        assert made_natbench.genotype(code) == natbench.genotype(code)
        assert made_natbench.code(natbench.genotype(code)) == code


@given(codes, rules)
def test_a_closure_is_what_brute_force_finds(code: int, rule: str) -> None:
    transitions = by_name(rule, SMALL.primitives)
    before = SMALL.digits(np.array(code))
    expected = [
        other
        for other in range(SMALL.size)
        if SMALL.params[other] <= SMALL.params[code]
        and all(
            transitions.allows(SMALL.primitives[s], SMALL.primitives[t], stride)
            for s, t, strides in zip(
                before, SMALL.digits(np.array(other)), SMALL.strides, strict=True
            )
            for stride in strides
        )
    ]
    found = SMALL.closure(SMALL.allowed(transitions), code)
    assert sorted(found.tolist()) == expected
    assert code in expected


def test_natbench_as_a_space(made_natbench: tabular.Space) -> None:
    space, table = made_natbench, natbench_table()
    for code in (0, 77, 1234, natbench.SIZE - 1):
        entry = table.entries[code]
        names = [space.primitives[d] for d in space.digits(np.array(code))]
        assert names == list(entry.primitives)
        assert space.validation[code] == entry.mean_validation
        assert space.test[code] == entry.mean_test
        assert (space.params[code], space.madds[code]) == (entry.params, entry.madds)
    # An edge from the input serves both strides, so its transitions must be safe at both.
    safe = by_name("natpp_cost_safe")
    allowed = space.allowed(safe)
    pool, skip = (space.primitives.index(n) for n in ("max_pool_3x3", "skip_connect"))
    assert safe.allows("max_pool_3x3", "skip_connect", 1)
    assert not safe.allows("max_pool_3x3", "skip_connect", 2)
    assert allowed[:, pool, skip].tolist() == [False, False, True]


def test_an_incomplete_natbench_is_refused_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(natbench, "load", lambda: natbench_table(complete=False))
    tabular.load.cache_clear()
    with pytest.raises(NatlibError, match="natbench holds 4393 of 4394 trainings"):
        tabular.load("natbench")
    assert "4393 of 4394" in tabular.lacks("natbench")
    assert tabular.checksum("natbench") == "made"
    with pytest.raises(NatlibError, match="space 'x' is not one of"):
        tabular.load("x")


@pytest.mark.skipif(nasbench201.locate() is None, reason="NAS-Bench-201's table is not here")
def test_nasbench201_as_a_space() -> None:
    space, table = tabular.load("nasbench201 cifar100"), nasbench201.load("cifar100")
    assert tabular.lacks("nasbench201 cifar100") == ""
    for entry in table.entries[::1000]:
        code = space.codes(np.array([space.primitives.index(p) for p in entry.primitives]))
        assert space.validation[code] == entry.mean_validation
        assert space.test[code] == entry.mean_test
        assert space.madds[code] == entry.madds
    # At stride 1 no transition of NAT++ costs more, and ours adds and drops none.
    allowed = [space.allowed(by_name(r, space.primitives)) for r in ("natpp", "natpp_cost_safe")]
    assert (allowed[0] == allowed[1]).all()
    for code in range(0, space.size, 997):
        steps = [allowed[0][e, d].sum() for e, d in enumerate(space.digits(np.array(code)))]
        assert len(space.closure(allowed[0], code)) == np.prod(steps)


def test_nothing_in_training_computes_as_a_held_out_architecture_does() -> None:
    out, rest = SMALL.split(20, generator(0))
    assert len(set(out.tolist())) == 20
    assert not set(SMALL.computation[out]) & set(SMALL.computation[rest])
    alike = np.isin(SMALL.computation, SMALL.computation[out])
    assert len(rest) + alike.sum() == SMALL.size
    for wrong in (0, SMALL.size):
        with pytest.raises(NatlibError, match="held_out"):
            SMALL.split(wrong, generator(0))


@settings(max_examples=30)
@given(st.lists(st.tuples(codes, codes), min_size=1, max_size=5))
def test_shares_of_the_edges_add_up(pairs: list[tuple[int, int]]) -> None:
    before, after = np.array(pairs).T
    shares = attribute(SMALL, before, after, SMALL.test)
    assert shares.sum(1) == pytest.approx(SMALL.test[after] - SMALL.test[before])
    same = SMALL.digits(before) == SMALL.digits(after)
    assert shares[same] == pytest.approx(0)


def test_shares_where_edges_do_not_interact_are_their_own_effects() -> None:
    values = SMALL.digits(np.arange(SMALL.size)) @ np.array([1.0, 10.0, 100.0])
    shares = attribute(SMALL, np.array([0]), np.array([SMALL.size - 1]), values)
    assert shares.tolist() == [pytest.approx([3.0, 30.0, 300.0])]


def test_kinds_of_transitions() -> None:
    assert kind_of("conv_3x3", "conv_3x3") is None
    assert kind_of("conv_3x3", "conv_1x1") == KINDS[0]
    assert kind_of("max_pool_3x3", "skip_connect") == KINDS[1]
    assert kind_of("skip_connect", "null") == KINDS[2]
    assert kind_of("null", "skip_connect") == KINDS[3]


def test_natbench_chosen_by_one_training_and_reported_by_the_other(
    made_natbench: tabular.Space,
) -> None:
    entries = natbench_table().entries
    for chooses in natbench.SEEDS:
        space = tabular.from_natbench(chooses)
        for code in (0, 77, 1234, natbench.SIZE - 1):
            assert space.validation[code] == entries[code].validation[chooses]
            assert space.test[code] == entries[code].test[1 - chooses]
        assert np.array_equal(space.madds, made_natbench.madds)
        assert tabular.checksum(space.name) == made_natbench.checksum


def test_seeds_take_turns_on_natbench_alone() -> None:
    assert [tabular.in_turn("natbench", seed) for seed in range(3)] == [
        "natbench 0",
        "natbench 1",
        "natbench 0",
    ]
    assert tabular.in_turn("nasbench201 cifar10", 1) == "nasbench201 cifar10"
    with pytest.raises(NatlibError, match="space 'natbench 2' is not one of 'natbench'"):
        tabular.load("natbench 2")
