from __future__ import annotations

import pytest
from hypothesis import given

from natlib import NatlibError
from natlib.handcrafted import MACROS, macro
from natlib.macro import (
    ACTIVATION,
    BlockMacro,
    ImageNetMacro,
    Layer,
    MacroConfig,
    Position,
    Shape,
    Stage,
    conv,
    pool,
)
from natlib.primitives import primitive
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


# --- ImageNet --------------------------------------------------------------------------------


def test_imagenet_cells_begin_behind_a_stem_that_halves_three_times() -> None:
    places = list(ImageNetMacro(48, 14).positions())
    assert len(places) == 14
    assert places[0] == Position("normal", 48, 28, True)
    assert places[1] == Position("normal", 48, 28, False)
    assert [i for i, p in enumerate(places) if p.kind == "reduce"] == [4, 9]
    assert places[-1] == Position("normal", 192, 7, False)


@pytest.mark.parametrize("name", ["channels", "cells", "classes", "image_size", "image_channels"])
@pytest.mark.parametrize("bad", [0, -4, 8.0, None])
def test_values_that_no_imagenet_network_can_have_are_named(name: str, bad: object) -> None:
    with pytest.raises(NatlibError) as error:
        ImageNetMacro(**{name: bad})  # type: ignore[arg-type]
    assert f"{name} = {bad!r}" in str(error.value)


def test_imagenet_channels_must_be_even_and_sides_multiples_of_32() -> None:
    with pytest.raises(NatlibError, match="channels = 7"):
        ImageNetMacro(channels=7)
    with pytest.raises(NatlibError, match="image_size = 200"):
        ImageNetMacro(image_size=200)


# --- blocks ----------------------------------------------------------------------------------

STEM = (conv(8, 3), ACTIVATION)


def shapes(block: str, stage: Stage) -> list[tuple[tuple[int, int], ...]]:
    """(channels, size) of the nodes of each block of one stage, on 16 x 16 images."""
    places = BlockMacro(block, (stage,), STEM, image_size=16).positions()
    return [tuple((s.channels, s.size) for s in p.block.shapes) for p in places if p.block]


def test_where_the_nodes_of_a_block_halve_and_widen() -> None:
    assert shapes("basic", Stage(16, 2, 2)) == [
        ((8, 16), (8, 16), (8, 16), (16, 8)),
        ((8, 16), (16, 8), (16, 8), (16, 8)),
    ]
    assert shapes("convolution", Stage(16, 1, 2)) == [((8, 16), (8, 16), (8, 8), (16, 8))]
    assert shapes("bottleneck", Stage(16, 1, 2)) == [((8, 16), (8, 16), (4, 16), (4, 8), (16, 8))]
    assert shapes("inverted", Stage(16, 1, 2, 6)) == [
        ((8, 16), (8, 16), (48, 16), (48, 8), (16, 8))
    ]


def test_blocks_of_stride_2_and_where_asked_those_that_widen_are_reduction_cells() -> None:
    stages = (Stage(8, 2), Stage(16, 2, 2), Stage(24, 2))
    kinds = [p.kind for p in BlockMacro("inverted", stages, STEM).positions()]
    assert kinds == ["normal", "normal", "reduce", "normal", "normal", "normal"]
    kinds = [p.kind for p in BlockMacro("inverted", stages, STEM, widen="reduce").positions()]
    assert kinds == ["normal", "normal", "reduce", "normal", "reduce", "normal"]


def layers(block: str, name: str, source: int, target: int) -> tuple[Layer, ...]:
    """The layers of an edge in the second block of a stage that widens 8 to 16 and halves."""
    place = list(BlockMacro(block, (Stage(16, 2, 2),), STEM).positions())[1]
    assert place.block is not None
    return place.block.layers(primitive(name), source, target)


def test_a_skip_is_a_node_itself_a_projection_or_in_vgg_a_pool() -> None:
    assert layers("basic", "skip_connect", 1, 3) == ()
    assert layers("basic", "skip_connect", 0, 3) == (conv(16, 1, 2),)
    assert layers("basic", "skip_connect", 0, 2) == (conv(16, 1, 2),)
    assert layers("convolution", "skip_connect", 0, 3) == (
        pool("max_pool", 2, 2, False),
        conv(16, 1),
    )
    assert layers("basic", "null", 0, 3) == ()


def test_pooling_to_other_channels_is_followed_by_a_projection() -> None:
    assert layers("basic", "max_pool_3x3", 1, 3) == (pool("max_pool", 3, 1, True),)
    assert layers("basic", "avg_pool_5x5", 0, 3) == (pool("avg_pool", 5, 2, True), conv(16, 1))


def test_layers_know_their_output_side() -> None:
    assert conv(4, 7, 2).out((224, 224)) == (112, 112)
    assert pool("max_pool", 3, 2, True).out((112, 112)) == (56, 56)
    assert pool("avg_pool", 5, 3, False).out((8, 8)) == (2, 2)
    assert Layer("conv", 4, (1, 7), (1, 2)).out((8, 8)) == (8, 4)


def test_hand_crafted_networks_end_in_the_shapes_of_their_papers() -> None:
    last = {f"{name} {data}": m.last for (name, data), m in MACROS.items()}
    assert last == {
        "VGG16 CIFAR-10": Shape(512, 2),
        "ResNet20 CIFAR-10": Shape(64, 8),
        "ResNet56 CIFAR-10": Shape(64, 8),
        "MobileNetV2 CIFAR-10": Shape(320, 4),
        "VGG16 ImageNet": Shape(512, 14),
        "ResNet18 ImageNet": Shape(512, 7),
        "ResNet50 ImageNet": Shape(2048, 7),
        "MobileNetV2 ImageNet": Shape(320, 7),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "dense"}, "'dense' is not one of convolution, basic, bottleneck, inverted"),
        ({"widen": "wide"}, "widen = 'wide'"),
        ({"stages": ()}, "stages are empty"),
        ({"stages": (Stage(0, 1),)}, "channels = 0"),
        ({"stages": (Stage(8, 1, 3),)}, "stride = 3"),
        ({"stages": (Stage(8, 1, 2), Stage(8, 1, 2)), "image_size": 30}, "a multiple of 4"),
        ({"classes": 0}, "classes = 0"),
    ],
)
def test_blocks_that_cannot_be_are_named(options: dict[str, object], message: str) -> None:
    plain: dict[str, object] = {"block": "basic", "stages": (Stage(8, 1),), "stem": STEM}
    with pytest.raises(NatlibError, match=message):
        BlockMacro(**(plain | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [("VGG16", "MNIST"), ("AlexNet", "ImageNet"), (["VGG16"], None)])
def test_an_unknown_network_is_named_with_those_there_are(bad: tuple[object, object]) -> None:
    with pytest.raises(NatlibError) as error:
        macro(*bad)  # type: ignore[arg-type]
    assert repr(bad[0]) in str(error.value) and "ResNet56 on CIFAR-10" in str(error.value)
