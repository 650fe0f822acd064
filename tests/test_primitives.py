from __future__ import annotations

import csv
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natlib import NatlibError
from natlib.primitives import (
    ALL_PRIMITIVES,
    NAT_PRIMITIVES,
    PRIMITIVES,
    RANKS,
    Cost,
    primitive,
)

GOLDEN = Path(__file__).parent / "golden"
ROWS = list(csv.DictReader((GOLDEN / "primitive_costs.csv").open()))

names = st.sampled_from(ALL_PRIMITIVES)
channels = st.integers(1, 300)
sizes = st.integers(1, 64)
costs = st.builds(Cost, st.integers(0, 10**9), st.integers(0, 10**12))


def test_the_13_primitives_of_natpp_in_the_order_of_the_authors_code() -> None:
    assert PRIMITIVES == (
        "max_pool_3x3", "max_pool_5x5", "avg_pool_3x3", "avg_pool_5x5", "skip_connect",
        "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
        "conv_1x1", "conv_3x3", "conv_5x5", "null",
    )  # fmt: skip
    assert set(NAT_PRIMITIVES) < set(PRIMITIVES)
    assert len(NAT_PRIMITIVES) == len(set(NAT_PRIMITIVES)) == 9
    outside = {"conv_1x3_3x1", "conv_1x7_7x1", "conv_7x1_1x7", "avg_pool_2x2", "max_pool_2x2"}
    assert set(ALL_PRIMITIVES) - set(PRIMITIVES) == outside
    assert len(ALL_PRIMITIVES) == 18


def test_every_primitive_answers_to_its_name() -> None:
    assert [primitive(name).name for name in ALL_PRIMITIVES] == list(ALL_PRIMITIVES)


def test_kinds_kernels_and_sizes() -> None:
    found = {n: (primitive(n).kind, primitive(n).kernel, primitive(n).size) for n in ALL_PRIMITIVES}
    assert found == {
        "max_pool_2x2": ("max_pool", (2, 2), 2),
        "max_pool_3x3": ("max_pool", (3, 3), 3),
        "max_pool_5x5": ("max_pool", (5, 5), 5),
        "avg_pool_2x2": ("avg_pool", (2, 2), 2),
        "avg_pool_3x3": ("avg_pool", (3, 3), 3),
        "avg_pool_5x5": ("avg_pool", (5, 5), 5),
        "skip_connect": ("skip", (0, 0), 0),
        "sep_conv_3x3": ("sep_conv", (3, 3), 3),
        "sep_conv_5x5": ("sep_conv", (5, 5), 5),
        "dil_conv_3x3": ("dil_conv", (3, 3), 3),
        "dil_conv_5x5": ("dil_conv", (5, 5), 5),
        "conv_1x1": ("conv", (1, 1), 1),
        "conv_3x3": ("conv", (3, 3), 3),
        "conv_5x5": ("conv", (5, 5), 5),
        "conv_1x3_3x1": ("conv", (1, 3), 3),
        "conv_1x7_7x1": ("conv", (1, 7), 7),
        "conv_7x1_1x7": ("conv", (7, 1), 7),
        "null": ("null", (0, 0), 0),
    }


def test_order_of_kinds_is_that_of_natpp() -> None:
    assert sorted(set(RANKS), key=lambda kind: (RANKS[kind], kind)) == [
        "conv", "sep_conv", "dil_conv", "avg_pool", "max_pool", "skip", "null"
    ]  # fmt: skip
    assert RANKS["max_pool"] == RANKS["avg_pool"]
    assert len(set(RANKS.values())) == 6


@pytest.mark.parametrize("row", ROWS, ids=[row["primitive"] for row in ROWS])
def test_cost_is_that_of_natpp_figure_4(row: dict[str, str]) -> None:
    name = row["primitive"]
    kinds = (f"max_{name}", f"avg_{name}") if name.startswith("pool") else (name,)
    for kind in kinds:
        cost = primitive(kind).cost(128, 32)
        assert f"{cost.params / 1e3:.1f}" == row["params_k"]
        assert f"{cost.madds / 1e6:.1f}" == row["madds_m"]


def test_the_figure_has_a_row_for_each_of_the_13() -> None:
    named = {row["primitive"] for row in ROWS}
    assert named == {n.removeprefix("max_").removeprefix("avg_") for n in PRIMITIVES}


@given(channels, sizes)
def test_costs_in_full_at_stride_1(c: int, s: int) -> None:
    assert {name: primitive(name).cost(c, s) for name in ALL_PRIMITIVES} == {
        "max_pool_2x2": Cost(0, 4 * c * s * s),
        "max_pool_3x3": Cost(0, 9 * c * s * s),
        "max_pool_5x5": Cost(0, 25 * c * s * s),
        "avg_pool_2x2": Cost(0, 4 * c * s * s),
        "avg_pool_3x3": Cost(0, 9 * c * s * s),
        "avg_pool_5x5": Cost(0, 25 * c * s * s),
        "skip_connect": Cost(0, c * s * s),
        "sep_conv_3x3": Cost(2 * (9 * c + c * c), 2 * (9 * c + c * c) * s * s),
        "sep_conv_5x5": Cost(2 * (25 * c + c * c), 2 * (25 * c + c * c) * s * s),
        "dil_conv_3x3": Cost(9 * c + c * c, (9 * c + c * c) * s * s),
        "dil_conv_5x5": Cost(25 * c + c * c, (25 * c + c * c) * s * s),
        "conv_1x1": Cost(c * c, c * c * s * s),
        "conv_3x3": Cost(9 * c * c, 9 * c * c * s * s),
        "conv_5x5": Cost(25 * c * c, 25 * c * c * s * s),
        "conv_1x3_3x1": Cost(6 * c * c, 6 * c * c * s * s),
        "conv_1x7_7x1": Cost(14 * c * c, 14 * c * c * s * s),
        "conv_7x1_1x7": Cost(14 * c * c, 14 * c * c * s * s),
        "null": Cost(0, 0),
    }


@given(names, channels, sizes)
def test_stride_2_sees_as_many_places_as_an_image_of_half_the_side(
    name: str, c: int, s: int
) -> None:
    p, half = primitive(name), (s + 1) // 2
    if p.kind == "skip":
        # A factorized reduction: 1x1 convolutions, so dearer than nothing at all.
        assert p.cost(c, s, 2) == Cost(c * c, c * c * half * half)
    elif p.factorized:
        one = (p.weights(c) // 2) * (s * half)
        assert p.cost(c, s, 2) == Cost(p.weights(c), one + (p.weights(c) // 2) * half * half)
    else:
        assert p.cost(c, s, 2) == p.cost(c, half, 1)


@given(channels, sizes, st.sampled_from([1, 2]))
def test_null_costs_nothing(c: int, s: int, stride: int) -> None:
    null = primitive("null")
    assert null.cost(c, s, stride) == Cost(0, 0)
    assert null.weights(c, stride) == null.batch_norms(stride) == 0
    assert null.conv_madds(c, s, stride) == 0


def test_batch_norms_with_parameters() -> None:
    by_stride = {n: [primitive(n).batch_norms(s) for s in (1, 2)] for n in PRIMITIVES}
    assert by_stride == {
        "max_pool_3x3": [0, 0], "max_pool_5x5": [0, 0], "avg_pool_3x3": [0, 0],
        "avg_pool_5x5": [0, 0], "skip_connect": [0, 1], "sep_conv_3x3": [2, 2],
        "sep_conv_5x5": [2, 2], "dil_conv_3x3": [1, 1], "dil_conv_5x5": [1, 1],
        "conv_1x1": [1, 1], "conv_3x3": [1, 1], "conv_5x5": [1, 1], "null": [0, 0],
    }  # fmt: skip


@pytest.mark.parametrize("bad", ["sep_conv_7x7", "", "Null", "sep_conv_3x3 ", None, 3, ["null"]])
def test_unknown_primitive_is_named_with_what_is_allowed(bad: object) -> None:
    with pytest.raises(NatlibError) as error:
        primitive(bad)  # type: ignore[arg-type]
    assert repr(bad) in str(error.value)
    assert all(name in str(error.value) for name in ALL_PRIMITIVES)


@given(costs, costs, costs)
def test_costs_add_up(a: Cost, b: Cost, c: Cost) -> None:
    assert a + b == Cost(a.params + b.params, a.madds + b.madds) == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Cost() == a


@given(costs, costs)
def test_within_needs_both_params_and_madds(a: Cost, b: Cost) -> None:
    assert a.within(b) == (a.params <= b.params and a.madds <= b.madds)
    assert a.within(a)
    assert a.within(a + b)
    assert not Cost(a.params + 1, a.madds).within(a)
    assert not Cost(a.params, a.madds + 1).within(a)


def test_primitives_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        primitive("null").name = "skip_connect"  # type: ignore[misc]
