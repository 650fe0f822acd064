from __future__ import annotations

import pytest

from natlib import NatlibError, zoo
from natlib.genotype import Genotype
from natlib.primitives import ALL_PRIMITIVES, NAT_PRIMITIVES, PRIMITIVES
from natlib.transitions import by_name
from natlib.zoo import SOURCES, ZOO

ORIGINALS = {
    "DARTS": "DARTS",
    "ENAS": "ENAS",
    "NAONet": "NAONet",
    "VGG": "VGG",
    "ResBlock": "ResBlock",
    "MobileNetv2": "Mobilenetv2",
    **{f"R{i}": f"R{i}" for i in range(1, 6)},
}
"""The name of an input inside the names of its rewritings, and its own name."""


def test_every_genotype_has_a_source() -> None:
    assert set(ZOO) == set(SOURCES)
    assert all(SOURCES.values())


def test_inputs_and_their_rewritings_are_all_there() -> None:
    rewritings = {f"NAT_{name}" for name in ORIGINALS}
    rewritings |= {f"NATv2_{name}" for name in ORIGINALS if not name[1:].isdigit()}
    assert set(ZOO) == set(ORIGINALS.values()) | rewritings


@pytest.mark.parametrize("name", [n for n in ZOO if n.startswith("NAT")])
def test_a_rewriting_keeps_its_inputs_graph(name: str) -> None:
    before = ZOO[ORIGINALS[name.split("_", 1)[1]]]
    assert before.with_primitives(ZOO[name].primitives) == ZOO[name]
    assert ZOO[name] != before


def test_shapes() -> None:
    shape = {
        name: (ZOO[name].normal.nodes, ZOO[name].normal.concat, ZOO[name].reduce.concat)
        for name in ORIGINALS.values()
    }
    every = (2, 3, 4, 5)
    assert shape == {
        "DARTS": (4, every, every),
        "ENAS": (5, (2, 3, 4, 5, 6), (2, 3, 6)),
        "NAONet": (5, (3, 5, 6), (3, 4, 5, 6)),
        "VGG": (4, (5,), (5,)),
        "ResBlock": (4, (5,), (5,)),
        "Mobilenetv2": (4, (5,), (5,)),
        **{f"R{i}": (4, every, every) for i in range(1, 6)},
    }
    for genotype in ZOO.values():
        assert genotype.normal.nodes == genotype.reduce.nodes
        assert all(len(g) == 2 for _, cell in genotype.cells for g in cell.in_edges)


def test_only_naonet_needs_primitives_outside_the_13() -> None:
    outside = {name for name, g in ZOO.items() if set(g.primitives) - set(PRIMITIVES)}
    assert outside == {"NAONet", "NAT_NAONet", "NATv2_NAONet"}
    # What NAT wrote into a network are its own nine primitives, besides what was there.
    for name in ("DARTS", "ENAS", "R1", "R2", "R3", "R4", "R5"):
        assert set(ZOO[f"NAT_{name}"].primitives) <= set(NAT_PRIMITIVES)


def test_mobilenet_was_published_with_one_rewriting_for_both_methods() -> None:
    assert ZOO["NAT_MobileNetv2"] == ZOO["NATv2_MobileNetv2"]


def test_get() -> None:
    assert zoo.get("DARTS") is ZOO["DARTS"]
    assert isinstance(zoo.get("VGG"), Genotype)


@pytest.mark.parametrize("bad", ["darts", "", "DARTS ", None, 3, ["DARTS"]])
def test_unknown_genotype_is_named_with_what_is_allowed(bad: object) -> None:
    with pytest.raises(NatlibError) as error:
        zoo.get(bad)  # type: ignore[arg-type]
    assert repr(bad) in str(error.value)
    assert all(name in str(error.value) for name in ZOO)


def test_the_zoo_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ZOO["DARTS"] = ZOO["VGG"]  # type: ignore[index]


def test_every_published_rewriting_stands_on_the_graph_of_its_input() -> None:
    assert len(zoo.REWRITINGS) == sum(name.startswith("NAT") for name in zoo.ZOO) == 17
    for before, after, rule in zoo.REWRITINGS:
        assert rule == ("natpp" if after.startswith("NATv2") else "nat")
        by_name(rule, ALL_PRIMITIVES).violations(zoo.get(before), zoo.get(after))
