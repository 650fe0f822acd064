"""Hand-crafted networks as cells under a macro architecture: VGG, ResNet, MobileNetV2."""

from __future__ import annotations

import math
from dataclasses import replace

from natlib import zoo
from natlib.errors import NatlibError
from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import ACTIVATION, BlockMacro, Stage, conv, depthwise, pool

_VGG = Cell(
    (
        Edge(0, 2, "null"),
        Edge(1, 2, "skip_connect"),
        Edge(0, 3, "null"),
        Edge(2, 3, "conv_3x3"),
    ),
    (3,),
)
_BOTTLENECK = Cell(
    (
        Edge(0, 2, "null"),
        Edge(1, 2, "conv_1x1"),
        Edge(0, 3, "null"),
        Edge(2, 3, "conv_3x3"),
        Edge(0, 4, "null"),
        Edge(3, 4, "conv_1x1"),
        Edge(1, 5, "skip_connect"),
        Edge(4, 5, "skip_connect"),
    ),
    (5,),
)

ORIGINALS: dict[str, Genotype] = {
    "VGG16": Genotype(_VGG, _VGG),
    "ResNet18": zoo.get("ResBlock"),
    "ResNet20": zoo.get("ResBlock"),
    "ResNet50": Genotype(_BOTTLENECK, _BOTTLENECK),
    "ResNet56": zoo.get("ResBlock"),
    "MobileNetV2": zoo.get("Mobilenetv2"),
}
"""The cells of each hand-crafted network as it was published, before any transformation."""


def _vgg(hidden: int, classes: int, image_size: int, batch_norm: bool) -> BlockMacro:
    stages = (Stage(64, 1), Stage(128, 2, 2), Stage(256, 3, 2), Stage(512, 3, 2), Stage(512, 3, 2))
    return BlockMacro(
        "convolution", stages, stem=(conv(64, 3), ACTIVATION),
        head=(pool("max_pool", 2, 2, False),), hidden=(hidden, hidden), classes=classes,
        image_size=image_size, batch_norm=batch_norm,
    )  # fmt: skip


def _resnet_cifar(blocks: int) -> BlockMacro:
    stages = (Stage(16, blocks), Stage(32, blocks, 2), Stage(64, blocks, 2))
    return BlockMacro("basic", stages, stem=(conv(16, 3), ACTIVATION))


def _resnet_imagenet(block: str, expansion: int, blocks: tuple[int, ...]) -> BlockMacro:
    stages = tuple(Stage(64 * 2**i * expansion, n, 2 if i else 1) for i, n in enumerate(blocks))
    stem = (conv(64, 7, 2), ACTIVATION, pool("max_pool", 3, 2, True))
    return BlockMacro(block, stages, stem=stem, classes=1000, image_size=224)


# Expansion, channels, blocks and stride of MobileNetV2's stages after the first (Table 2 there).
_INVERTED = (
    (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def _mobilenet_cifar() -> BlockMacro:
    # Halves three times instead of five. Its first stage is a block as all others, and blocks that
    # widen at stride 1 have a projection: that is the network whose costs NAT prints.
    stages = (
        Stage(16, 1),
        *(Stage(c, n, 1 if c == 24 else s, t) for t, c, n, s in _INVERTED),
    )
    return BlockMacro(
        "inverted", stages, stem=(conv(32, 3), ACTIVATION), head=(conv(1280, 1), ACTIVATION)
    )


def _mobilenet_imagenet() -> BlockMacro:
    # Without expansion the first block is no cell: it has nothing to expand.
    stem = (conv(32, 3, 2), ACTIVATION, depthwise(3), ACTIVATION, conv(16, 1))
    return BlockMacro(
        "inverted", tuple(Stage(c, n, s, t) for t, c, n, s in _INVERTED), stem=stem,
        head=(conv(1280, 1), ACTIVATION), classes=1000, image_size=224, widen="reduce",
    )  # fmt: skip


MACROS: dict[tuple[str, str], BlockMacro] = {
    ("VGG16", "CIFAR-10"): _vgg(512, 10, 32, batch_norm=True),
    ("ResNet20", "CIFAR-10"): _resnet_cifar(3),
    ("ResNet56", "CIFAR-10"): _resnet_cifar(9),
    ("MobileNetV2", "CIFAR-10"): _mobilenet_cifar(),
    ("VGG16", "ImageNet"): _vgg(4096, 1000, 224, batch_norm=False),
    ("ResNet18", "ImageNet"): _resnet_imagenet("basic", 1, (2, 2, 2, 2)),
    ("ResNet50", "ImageNet"): _resnet_imagenet("bottleneck", 4, (3, 4, 6, 3)),
    ("MobileNetV2", "ImageNet"): _mobilenet_imagenet(),
}
"""The macro architecture of each hand-crafted network, by its name and data set."""


def macro(network: str, dataset: str) -> BlockMacro:
    """Return the macro architecture of a hand-crafted network on "CIFAR-10" or "ImageNet".

    Raises NatlibError on a network or data set that NAT's Table 1 does not have, listing those it
    has.
    """
    try:
        return MACROS[network, dataset]
    except (KeyError, TypeError):
        known = ", ".join(f"{n} on {d}" for n, d in MACROS)
        raise NatlibError(f"no network {network!r} on {dataset!r}; there are {known}") from None


def scaled(
    macro: BlockMacro, width: float, classes: int, image_size: int, image_channels: int = 3
) -> BlockMacro:
    """Return a hand-crafted network with ``width`` times the channels, for other images.

    Channels and hidden units are rounded to multiples of 8, at least 8 (PyTorch 2 has been seen to
    write past its memory in convolutions of 4 channels on a CPU); depth and strides stay. A pooling
    of the head that would have a single pixel to pool is left out (VGG16 on 16x16 images).
    Raises NatlibError on a width that is not above 0 and on sizes that the strides do not divide.
    """
    if not width > 0:
        raise NatlibError(f"width = {width!r}; it must be above 0")

    def narrow(channels: int) -> int:
        return channels and max(8, 8 * round(channels * width / 8))

    strides = [layer.stride[0] for layer in macro.stem] + [s.stride for s in macro.stages]
    single = image_size == math.prod(strides)
    return replace(
        macro,
        stages=tuple(replace(s, channels=narrow(s.channels)) for s in macro.stages),
        stem=tuple(replace(x, channels=narrow(x.channels)) for x in macro.stem),
        head=tuple(
            replace(x, channels=narrow(x.channels))
            for x in macro.head
            if not (single and x.kind.endswith("pool"))
        ),
        hidden=tuple(map(narrow, macro.hidden)),
        classes=classes,
        image_size=image_size,
        image_channels=image_channels,
    )
