"""Hypothesis strategies for cells and genotypes, and small things that several tests need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.operations import Pooling
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES


@st.composite
def cells(
    draw: st.DrawFn,
    primitives: Sequence[str] = PRIMITIVES,
    nodes: Sequence[int] = (1, 2, 3, 4, 5),
    degrees: Sequence[int] = (2,),
    concat: str = "any",
) -> Cell:
    """Draw a valid cell; ``concat`` "all" names every node in order, "any" some in any order."""
    last = INPUTS + draw(st.sampled_from(nodes)) - 1
    everyone = tuple(range(INPUTS, last + 1))
    edges = [
        Edge(draw(st.integers(0, target - 1)), target, draw(st.sampled_from(primitives)))
        for target in everyone
        for _ in range(draw(st.sampled_from(degrees)))
    ]
    if concat == "all":
        return Cell(tuple(edges), everyone)
    chosen = draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
    return Cell(tuple(edges), tuple(chosen))


@st.composite
def genotypes(
    draw: st.DrawFn,
    primitives: Sequence[str] = PRIMITIVES,
    nodes: Sequence[int] = (1, 2, 3, 4, 5),
    degrees: Sequence[int] = (2,),
    concat: str = "any",
) -> Genotype:
    """Draw a valid genotype; both cells as ``cells`` draws them."""
    kind = cells(primitives, nodes, degrees, concat)
    return Genotype(draw(kind), draw(kind))


def any_genotypes() -> st.SearchStrategy[Genotype]:
    """Genotypes with all primitives that natlib can build and one to three inputs a node."""
    return genotypes(ALL_PRIMITIVES, degrees=(1, 2, 3))


macros = st.builds(
    MacroConfig,
    channels=st.integers(4, 64).map(lambda c: 2 * c),
    cells=st.integers(1, 9),
    classes=st.integers(1, 12),
    image_size=st.sampled_from([4, 8, 12, 16, 20, 32]),
    image_channels=st.sampled_from([1, 3]),
    stem=st.integers(1, 3),
)


def chain(*names: str) -> Cell:
    """A cell of nodes in a row: node 2 reads both inputs, node 3 reads node 2, and so on."""
    edges = [Edge(0, 2, names[0]), Edge(1, 2, names[1])]
    edges += [Edge(i, i + 1, name) for i, name in enumerate(names[2:], INPUTS)]
    return Cell(tuple(edges), (len(names),))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_genotypes(count: int, seed: int = 0, nodes: Sequence[int] = (4,)) -> list[Genotype]:
    """Draw genotypes uniformly, without hypothesis, so that they may be many."""
    from natlib.search import SpaceConfig

    space, draw = SpaceConfig(tuple(nodes)), generator(seed)
    return [space.sample(draw) for _ in range(count)]


class Counting(TorchDispatchMode):
    """Counts operations by PyTorch's own formulas, pooling left out.

    ``FlopCounterMode``, which has the formulas, counts for each module apart, and takes as long
    over it as small networks run.
    """

    def __init__(self, network: CellNetwork) -> None:
        super().__init__()
        self.flops = self.pools = 0
        # Average pooling is computed as a convolution, but the papers' tables do not count it.
        self.hooks = [
            hook
            for module in network.modules()
            if isinstance(module, Pooling)
            for hook in (
                module.register_forward_pre_hook(lambda *_: self.enter(1)),
                module.register_forward_hook(lambda *_: self.enter(-1)),
            )
        ]

    def enter(self, change: int) -> None:
        """Note that a pooling begins or ends."""
        self.pools += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count it."""
        result = func(*args, **(kwargs or {}))
        if not self.pools and (count := flop_registry.get(func._overloadpacket)):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def run_counting(network: CellNetwork, images: Tensor) -> tuple[Tensor, int]:
    """Run a network and count the multiply-adds an image takes, pooling left out."""
    with Counting(network) as counting:
        logits = network(images)
    for hook in counting.hooks:
        hook.remove()
    assert counting.flops % (2 * len(images)) == 0
    return logits, counting.flops // (2 * len(images))


def all_runs(genotype: Genotype) -> bool:
    """Say whether every input and node is live, so that nothing is skipped when it runs."""
    return all(len(cell.live) == cell.nodes + INPUTS for _, cell in genotype.cells)


def luck(genotype: Genotype) -> float:
    """A score that depends on the genotype only, in a way nobody can guess."""
    return hashlib.sha256(repr(genotype).encode()).digest()[0] / 256


def lucks(genotypes: Sequence[Genotype]) -> list[float]:
    """Scores of many genotypes, as derive asks for them."""
    return [luck(g) for g in genotypes]
