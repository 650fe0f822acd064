"""Hand-crafted networks against torchvision's, and against what is known of their costs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from natlib.cost import Cost, network_cost
from natlib.handcrafted import MACROS, ORIGINALS, macro
from natlib.network import CellNetwork, parameter_count
from tests.strategies import generator, run_counting

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


@pytest.mark.parametrize(("name", "dataset"), MACROS)
def test_formula_is_what_a_network_holds_and_computes(name: str, dataset: str) -> None:
    network = built(name, dataset)
    m = network.macro
    image = torch.empty(1, 3, m.image_size, m.image_size, device="meta")
    counted = Cost(parameter_count(network.parameters()), run_counting(network, image)[1])
    assert counted == network_cost(ORIGINALS[name], m)
