"""Hypothesis strategies for cells and genotypes, and small things that several tests need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.operations import Pool
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


def run_counting(network: CellNetwork, images: Tensor) -> tuple[Tensor, int]:
    """Run a network and count the multiply-adds an image takes, pooling left out."""
    with FlopCounterMode(display=False) as counter:
        logits = network(images)
    flops = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    # Average pooling is computed as a convolution, but the papers' tables do not count it.
    pools = [f"CellNetwork.{n}" for n, m in network.named_modules() if isinstance(m, Pool)]
    total = flops["Global"] - sum(flops.get(name, 0) for name in pools)
    assert total % (2 * len(images)) == 0
    return logits, total // (2 * len(images))


def all_runs(genotype: Genotype) -> bool:
    """Say whether every input and node is live, so that nothing is skipped when it runs."""
    return all(len(cell.live) == cell.nodes + INPUTS for _, cell in genotype.cells)


def luck(genotype: Genotype) -> float:
    """A score that depends on the genotype only, in a way nobody can guess."""
    return hashlib.sha256(repr(genotype).encode()).digest()[0] / 256


def lucks(genotypes: Sequence[Genotype]) -> list[float]:
    """Scores of many genotypes, as derive asks for them."""
    return [luck(g) for g in genotypes]
