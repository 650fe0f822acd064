from __future__ import annotations

from typing import Any

import pytest
import torch

from natlib import NatlibError, ablation, handcrafted, zoo
from natlib.cost import network_cost
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.records import Record
from tests.strategies import generator

SIZE = MacroConfig(4, 3, 10, 8, 3)


def test_fixed_statistics_of_the_images_themselves_are_those_of_one_batch() -> None:
    network = CellNetwork(SIZE, nodes=4, primitives=("sep_conv_3x3", "max_pool_3x3", "null",
                          "skip_connect", "dil_conv_3x3"), generator=generator(0))  # fmt: skip
    genotype = zoo.get("DARTS")
    images, others = (torch.randn(40, 3, 8, 8, generator=generator(s)) for s in (1, 2))
    with torch.no_grad():
        whole = network(images, genotype)
        with ablation.fixed_statistics(network, images, genotype):
            assert torch.allclose(network(images, genotype), whole, atol=1e-4)
            # No image sees its neighbours any more.
            halves = torch.cat([network(half, genotype) for half in images.chunk(2)])
            assert torch.allclose(halves, whole, atol=1e-4)
        with ablation.fixed_statistics(network, others, genotype):
            assert not torch.allclose(network(images, genotype), whole, atol=1e-2)
        assert torch.equal(network(images, genotype), whole)
    assert network.training


@pytest.mark.parametrize("name", ["VGG16", "ResNet20", "MobileNetV2"])
def test_representations_compute_and_cost_the_same(name: str) -> None:
    original = handcrafted.ORIGINALS[name]
    graphs = ablation.representations(original)
    assert graphs["published"] == original
    assert len(set(graphs.values())) == 3
    macro = handcrafted.scaled(handcrafted.macro(name, "CIFAR-10"), 0.25, 10, 32, 3)
    images = torch.randn(3, 3, 32, 32, generator=generator(1))
    outputs = []
    for graph in graphs.values():
        assert network_cost(graph, macro) == network_cost(original, macro)
        outputs.append(CellNetwork(macro, genotype=graph, generator=generator(0))(images))
    assert all(torch.allclose(out, outputs[0], atol=1e-4) for out in outputs)


def test_without_null_edges_there_is_nothing_to_vary() -> None:
    with pytest.raises(NatlibError, match="without null edges"):
        ablation.representations(zoo.get("DARTS"))


def test_what_costs_more_is_never_picked_and_what_is_picked_by_one_score_counts_by_another() -> (
    None
):
    result: dict[str, Any] = {
        "within": [[True, False, True, True], [True, True, True, True]],
        "search": [[0.2, 0.9, 0.3, 0.4], [0.5, 0.1, 0.2, 0.3]],
        "report": [[0.1, 0.8, 0.2, 0.6], [0.4, 0.1, 0.1, 0.9]],
    }
    record = Record.__new__(Record)
    object.__setattr__(record, "result", result)
    assert ablation.picked(record, "search", 3).tolist() == [3, 0]
    assert ablation.picked(record, "search", 2).tolist() == [2, 0]
    assert ablation.gained(record, "search", 3) == pytest.approx(0.25)
    assert ablation.gained(record, "report", 3) == pytest.approx(0.5)
