"""Hand-crafted networks against torchvision's, and against what is known of their costs."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from natlib import NatlibError, network
from natlib.cost import Cost, network_cost
from natlib.genotype import Cell, Genotype
from natlib.handcrafted import MACROS, ORIGINALS, macro, scaled
from natlib.macro import ACTIVATION, BLOCKS, Block, BlockMacro, Layer, Shape, Stage, conv
from natlib.network import CellNetwork, parameter_count
from natlib.operations import BatchNorm
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES, primitive
from natlib.zoo import ZOO
from tests.plain_network import blocks_forward
from tests.strategies import all_runs, cells, generator, run_counting

GOLDEN = Path(__file__).parent / "golden" / "handcrafted_costs.csv"
TORCHVISION = {
    "VGG16": torchvision.models.vgg16,
    "ResNet18": torchvision.models.resnet18,
    "ResNet50": torchvision.models.resnet50,
    "MobileNetV2": torchvision.models.mobilenet_v2,
}


def built(network: str, dataset: str, device: str = "meta") -> CellNetwork:
    return CellNetwork(macro(network, dataset), genotype=ORIGINALS[network], device=device)


@pytest.mark.parametrize("name", TORCHVISION)
def test_params_and_madds_equal_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = TORCHVISION[name]()
    cost = network_cost(ORIGINALS[name], macro(name, "ImageNet"))
    assert cost.params == parameter_count(theirs.parameters())
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert cost.madds == run_counting(theirs, image)[1]  # type: ignore[arg-type]


@torch.no_grad()
def drawn(theirs: nn.Module) -> dict[str, Tensor]:
    """Give a network weights and statistics under which its logits are neither huge nor tiny."""
    draw = generator(1)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=draw)
            module.bias.uniform_(-0.2, 0.2, generator=draw)
            module.running_mean.uniform_(-0.2, 0.2, generator=draw)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5, generator=draw)  # type: ignore[union-attr]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            scale = (2 / module.weight[0].numel()) ** 0.5
            module.weight.normal_(0, scale, generator=draw)
            if module.bias is not None:
                module.bias.uniform_(-0.2, 0.2, generator=draw)
    return {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}


@pytest.mark.parametrize("name", TORCHVISION)
def test_logits_equal_torchvisions_after_copying_its_weights(name: str) -> None:
    theirs = TORCHVISION[name]().eval().double()
    ours = built(name, "ImageNet", "cpu").eval().double()
    # Both hold their layers in the order in which an image passes them.
    weights = list(drawn(theirs).values())
    names = list(ours.state_dict())
    assert [v.shape for v in weights] == [v.shape for v in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(names, weights, strict=True)))
    images = torch.randn(1, 3, 224, 224, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 1e-2


def test_costs_equal_the_recorded_ones() -> None:
    found = [
        {"network": n, "dataset": d, "params": str(cost.params), "madds": str(cost.madds)}
        for (n, d), m in MACROS.items()
        for cost in [network_cost(ORIGINALS[n], m)]
    ]
    assert found == list(csv.DictReader(GOLDEN.open()))


@pytest.mark.parametrize(("name", "dataset"), MACROS)
def test_formula_is_what_a_network_holds_and_computes(name: str, dataset: str) -> None:
    network = built(name, dataset)
    m = network.macro
    image = torch.empty(1, 3, m.image_size, m.image_size, device="meta")
    counted = Cost(parameter_count(network.parameters()), run_counting(network, image)[1])
    assert counted == network_cost(ORIGINALS[name], m)


# --- any genotype in a hand-crafted network ------------------------------------------------------


def small(block: str, **options: object) -> BlockMacro:
    """Blocks that keep, widen, and halve, between a stem and a head."""
    stages = (Stage(8, 2, 1, 2), Stage(12, 2, 1, 2), Stage(16, 2, 2, 2), Stage(16, 1, 2, 2))
    plain = BlockMacro(block, stages, (conv(8, 3), ACTIVATION), (conv(20, 1), ACTIVATION),
                       classes=5, image_size=16)  # fmt: skip
    return replace(plain, **options)  # type: ignore[arg-type]


macros = st.builds(
    small,
    st.sampled_from(BLOCKS),
    widen=st.sampled_from(["normal", "reduce"]),
    batch_norm=st.booleans(),
    hidden=st.sampled_from([(), (6,), (7, 6)]),
)


@st.composite
def genotypes(draw: st.DrawFn) -> Genotype:
    """Cells of three or more nodes that put out the last."""
    kind = cells(ALL_PRIMITIVES, nodes=(3, 4, 5), degrees=(1, 2, 3))
    return Genotype(*(Cell(c.edges, (c.nodes + 1,)) for c in (draw(kind), draw(kind))))


@given(genotypes(), macros)
@settings(max_examples=40)
def test_any_genotype_runs_and_costs_what_the_formula_says(
    genotype: Genotype, m: BlockMacro
) -> None:
    network = CellNetwork(m, genotype=genotype)
    logits, madds = run_counting(network, torch.randn(2, 3, 16, 16, generator=generator()))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    formula = network_cost(genotype, m)
    assert formula.params == parameter_count(network.parameters())
    assert madds <= formula.madds
    if all_runs(genotype):
        assert madds == formula.madds


@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_learns(block: str) -> None:
    network = CellNetwork(small(block, hidden=(6,)), genotype=ZOO["NAT_MobileNetv2"])
    network(torch.randn(4, 3, 16, 16, generator=generator())).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_pooling_of_a_block_has_no_batch_norm() -> None:
    pools = ["max_pool_3x3", "null", "avg_pool_3x3", "null", "skip_connect", "null", "null", "null"]
    genotype = ZOO["ResBlock"].with_primitives([*pools, *pools])
    network = CellNetwork(small("basic"), genotype=genotype)
    names = [type(m).__name__ for m in network.cells[0].edges.modules()]  # type: ignore[union-attr]
    assert names.count("Pooling") == 2 and "BatchNorm" not in names


def plainly(layers: Iterable[Layer], channels: int) -> nn.Sequential:
    """Build layers from PyTorch's own modules."""
    modules: list[nn.Module] = []
    for x in layers:
        if x.kind == "activation":
            modules.append(nn.ReLU())
        elif x.kind in ("max_pool", "avg_pool"):
            if x.kernel[0] % 2 == 0 and x.stride[0] == 1:
                modules.append(nn.ReplicationPad2d((0, 1, 0, 1)))
            modules.append(
                nn.MaxPool2d(x.kernel, x.stride, x.padding)
                if x.kind == "max_pool"
                else nn.AvgPool2d(x.kernel, x.stride, x.padding, count_include_pad=False)
            )
        else:
            width, groups = (x.channels, 1) if x.kind == "conv" else (channels, channels)
            modules.append(
                nn.Conv2d(channels, width, x.kernel, x.stride, x.padding, x.dilation, groups,
                          bias=False)
            )  # fmt: skip
            channels = width
            if x.norm:
                modules.append(nn.BatchNorm2d(channels))
    return nn.Sequential(*modules)


@pytest.mark.parametrize("name", ["ResBlock", "NAT_ResBlock", "NATv2_ResBlock", "R1"])
def test_a_network_equals_plain_pytorch_in_logits_and_gradients(name: str) -> None:
    # R1's cells with one output, in the place of the block.
    genotype = Genotype(*(Cell(c.edges, (5,)) for _, c in ZOO[name].cells))
    m = scaled(macro("ResNet20", "CIFAR-10"), 0.5, 5, 16)
    net = CellNetwork(m, genotype=genotype, generator=generator()).double()
    images = torch.randn(3, 3, 16, 16, generator=generator(), dtype=torch.float64)
    weights = list(net.parameters())
    ours, plain = net(images), blocks_forward(net, images)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(3, 5, generator=generator(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, weights, upstream, allow_unused=True),
        torch.autograd.grad(plain, weights, upstream, allow_unused=True),
        strict=True,
    ):
        # Plain PyTorch computes edges that nothing reads, without effect.
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


SHAPES = (Shape(8, 8), Shape(12, 8), Shape(8, 4))
JOINS = [(a, b) for a, b in product(range(3), repeat=2) if SHAPES[a].size >= SHAPES[b].size]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", [name for name in ALL_PRIMITIVES if name != "null"])
def test_operations_equal_ordinary_modules_in_values_and_gradients(
    name: str, kind: str, training: bool
) -> None:
    for a, b in JOINS:
        layers = Block(kind, SHAPES, True).layers(primitive(name), a, b)
        channels, side = SHAPES[a].channels, SHAPES[a].size
        ours, width = network._layers(layers, channels, small(kind), False)
        theirs = plainly(layers, channels)
        assert width == SHAPES[b].channels
        for module in ours.modules():
            if isinstance(module, BatchNorm):
                module.reset()
        weights = list(drawn(theirs).values())
        names = list(ours.state_dict())
        ours.load_state_dict(dict(zip(names, weights, strict=True)))
        ours, theirs = ours.double().train(training), theirs.double().train(training)
        start = torch.randn(3, channels, side, side, generator=generator(), dtype=torch.float64)
        inputs = [
            start.contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
        ]
        outputs = [f(x) for f, x in zip((ours, theirs), inputs, strict=True)]
        assert outputs[0].shape[2:] == (SHAPES[b].size,) * 2
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        wants = [[x, *f.parameters()] for x, f in zip(inputs, (ours, theirs), strict=True)]
        if layers:
            weighing = torch.randn(outputs[0].shape, generator=generator(2), dtype=torch.float64)
            grads = [
                torch.autograd.grad(y, w, weighing) for y, w in zip(outputs, wants, strict=True)
            ]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_published_rewritings_of_resnet_and_mobilenet_fit_their_networks() -> None:
    for name, before in (("ResBlock", "ResNet20"), ("MobileNetv2", "MobileNetV2")):
        for prefix in ("NAT", "NATv2"):
            cost = network_cost(ZOO[f"{prefix}_{name}"], macro(before, "CIFAR-10"))
            assert cost != network_cost(ORIGINALS[before], macro(before, "CIFAR-10"))


def test_the_convolutions_of_vgg16_alone_are_what_the_papers_print() -> None:
    m = macro("VGG16", "CIFAR-10")
    linear = sum(a * b for a, b in ((512, 512), (512, 512), (512, 10)))
    madds = network_cost(ORIGINALS["VGG16"], m).madds
    assert (f"{(madds - linear) / 1e6:.0f}", f"{madds / 1e6:.0f}") == ("313", "314")


@pytest.mark.parametrize("name", ["DARTS", "ENAS"])
def test_a_cell_that_puts_out_several_nodes_is_no_block(name: str) -> None:
    m = macro("ResNet20", "CIFAR-10")
    for refused in (network_cost, lambda g, m: CellNetwork(m, genotype=g)):
        with pytest.raises(NatlibError, match=r"normal cell puts out nodes \(2, 3, 4, 5"):
            refused(ZOO[name], m)


def test_a_bottleneck_puts_out_none_of_its_inner_nodes() -> None:
    cell = ZOO["Mobilenetv2"].normal
    inner = Cell(cell.edges, (3,))
    with pytest.raises(NatlibError, match=r"nodes \(3,\).*one node above 3"):
        network_cost(Genotype(inner, inner), macro("ResNet50", "ImageNet"))
    assert network_cost(Genotype(inner, inner), macro("ResNet20", "CIFAR-10"))


def test_a_hand_crafted_network_is_standalone() -> None:
    m = macro("ResNet20", "CIFAR-10")
    with pytest.raises(NatlibError, match="standalone"):
        CellNetwork(m, nodes=4, primitives=PRIMITIVES)
    with pytest.raises(NatlibError, match="standalone"):
        CellNetwork(m, genotype=ZOO["ResBlock"], shared=True)
    with pytest.raises(NatlibError, match="auxiliary"):
        CellNetwork(m, genotype=ZOO["ResBlock"], auxiliary=True)
