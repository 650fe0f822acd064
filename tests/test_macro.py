from __future__ import annotations

import pytest
from hypothesis import given

from natlib import NatlibError
from natlib.macro import MacroConfig, Position
from tests.strategies import macros


def test_the_published_supernet_has_reductions_at_a_third_and_two_thirds() -> None:
    assert list(MacroConfig(20, 8).positions()) == [
        Position("normal", 20, 32, False),
        Position("normal", 20, 32, False),
        Position("reduce", 40, 32, False),
        Position("normal", 40, 16, True),
        Position("normal", 40, 16, False),
        Position("reduce", 80, 16, False),
        Position("normal", 80, 8, True),
        Position("normal", 80, 8, False),
    ]
    assert MacroConfig(36, 20).reductions == (6, 13)


@given(macros)
def test_each_reduction_doubles_channels_and_halves_the_image(macro: MacroConfig) -> None:
    places = list(macro.positions())
    assert len(places) == macro.cells
    assert [i for i, p in enumerate(places) if p.kind == "reduce"] == list(macro.reductions)
    for i, place in enumerate(places):
        above = sum(r < i for r in macro.reductions)
        own = place.kind == "reduce"
        assert place.channels == macro.channels * 2 ** (above + own)
        assert place.size == macro.image_size // 2**above
        assert place.halve == (i > 0 and places[i - 1].kind == "reduce")


@pytest.mark.parametrize("name", ["channels", "cells", "classes", "image_size", "image_channels"])
@pytest.mark.parametrize("bad", [0, -4, 8.0, "8", None])
def test_values_that_no_network_can_have_are_named(name: str, bad: object) -> None:
    with pytest.raises(NatlibError) as error:
        MacroConfig(**{name: bad})  # type: ignore[arg-type]
    assert f"{name} = {bad!r}" in str(error.value)


def test_channels_must_be_even_and_sides_multiples_of_4() -> None:
    with pytest.raises(NatlibError, match="channels = 7"):
        MacroConfig(channels=7)
    with pytest.raises(NatlibError, match="image_size = 30"):
        MacroConfig(image_size=30)
