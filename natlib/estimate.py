"""What computing a record will cost, before it is computed: networks built without memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from natlib import zoo
from natlib.cost import auxiliary_cost, network_cost
from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Genotype
from natlib.macro import BlockMacro, ImageNetMacro, Macro, MacroConfig
from natlib.network import CellNetwork, parameter_count
from natlib.policy import build_logits
from natlib.primitives import primitive
from natlib.published import printed_costs
from natlib.train import DataConfig, stream
from natlib.transitions import by_name, edge_stride

IMAGENET = {"train": 1_281_167, "val": 50_000}
"""Images of ImageNet's splits. Source: Russakovsky et al., 2015, Table 2."""

IMAGENET_BYTES = 155 * 10**9
"""About what its JPEG files take on disk: 138 GB and 6.3 GB of archives, unpacked."""

RATE = 3 * network_cost(zoo.get("DARTS"), MacroConfig(36, 20)).madds * 50_000 * 600 / 86_400
"""Multiply-adds a second of the GPU that hours are of: one V100, as a user measured it.

600 epochs of DARTS (36 channels, 20 cells) on CIFAR-10 took about 24 h there, counted as three
forward passes an image. Source: issue 80 of quark0/darts, 2019. Newer GPUs are faster; steps of the
small supernet keep any GPU less busy than that.
"""


@dataclass(frozen=True)
class Estimate:
    """What records cost: networks built, records that train one, work, memory and disk.

    ``networks`` maps what was built to its parameters; ``published`` those of them whose printed
    parameters ours equal; ``madds`` counts a backward pass as two forward ones; ``memory`` is the
    peak of one worker, ``disk`` what stays (weights) and what one checkpoint takes, in bytes.
    ``unknown`` are the kinds of records that could not be estimated.
    """

    networks: dict[Any, int] = field(default_factory=dict)
    published: frozenset[Any] = frozenset()
    trainings: int = 0
    madds: float = 0.0
    memory: int = 0
    disk: int = 0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            {**self.networks, **other.networks},
            self.published | other.published,
            self.trainings + other.trainings,
            self.madds + other.madds,
            max(self.memory, other.memory),
            self.disk + other.disk,
            tuple(dict.fromkeys(self.unknown + other.unknown)),
        )

    @property
    def hours(self) -> float:
        """GPU-hours at ``RATE``."""
        return self.madds / RATE / 3600


@lru_cache(maxsize=1)
def _published() -> dict[Any, bool]:
    """Networks behind printed params: whether ours are equal to all digits."""
    return {r.network: r.agrees["params"] for r in printed_costs() if r.network and r.params}


def supernet_parameters(macro: MacroConfig, nodes: int, primitives: Sequence[str]) -> int:
    """Parameters of a supernet by formula: weights of every edge, no affine batch norms but one."""
    width = macro.stem * macro.channels
    total = 9 * macro.image_channels * width + 2 * width
    before = last = width
    for place in macro.positions():
        total += (before + last) * place.channels
        total += sum(
            primitive(p).weights(place.channels, edge_stride(s, place.kind))
            for t in range(INPUTS, INPUTS + nodes)
            for s in range(t)
            for p in primitives
        )
        before, last = last, place.channels * nodes
    return total + last * macro.classes + macro.classes


def _agree(what: str, built: nn.Module, formula: int) -> int:
    """Count the parameters of a network; raise NatlibError where they are not ``formula``."""
    count = parameter_count(built.parameters())
    if count != formula:
        raise NatlibError(f"{what} has {count} parameters when built, {formula} by natlib.cost")
    return count


def _held(network: CellNetwork, batch: int, *given: Genotype) -> int:
    """Bytes that a forward pass of ``batch`` images keeps for the backward pass."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storages[id(x.untyped_storage())] = x, x.untyped_storage().nbytes()
        return x

    m = network.macro
    x = torch.empty(batch, m.image_channels, m.image_size, m.image_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network.train()(x, *given)
    return sum(size for _, size in storages.values())


_measured: dict[tuple[Macro, bool, int], tuple[int, int]] = {}
"""For macro, auxiliary head and batch: MAdds of the dearest network yet, and what it holds."""


@lru_cache(maxsize=4096)
def standalone(genotype: Genotype, macro: Macro, auxiliary: bool, batch: int) -> tuple[int, int]:
    """Parameters of a network built on the meta device, and bytes that training it takes.

    What a training step holds is measured for networks dearer than all before at their place.
    Raises NatlibError where the parameters are not those that ``natlib.cost`` counts.
    """
    network = CellNetwork(macro, genotype=genotype, auxiliary=auxiliary, device="meta")
    cost = network_cost(genotype, macro)
    formula = cost.params
    if auxiliary and not isinstance(macro, BlockMacro):
        formula += auxiliary_cost(genotype, macro).params
    count = _agree(f"a network of {macro}", network, formula)
    place = macro, auxiliary, batch
    if place not in _measured or cost.madds > _measured[place][0]:
        _measured[place] = cost.madds, _held(network, batch)
    return count, 12 * count + _measured[place][1]


@lru_cache(maxsize=32)
def _supernet(space: Any, macro: MacroConfig, batch: int) -> tuple[int, int, float]:
    """Parameters and training bytes of a supernet, mean MAdds of what it draws."""
    nodes, names = max(space.nodes), space.primitives
    network = CellNetwork(macro, nodes=nodes, primitives=names, device="meta")
    count = _agree("a supernet", network, supernet_parameters(macro, nodes, names))
    generator = stream(0, "estimate")
    drawn = [space.sample(generator) for _ in range(32)]
    held = max(_held(network, batch, g) for g in drawn[:4])
    return count, 12 * count + held, fmean(network_cost(g, macro).madds for g in drawn)


def _images(config: DataConfig, channels: int) -> int:
    """Bytes of all parts on the device: as they are, and normalised."""
    number = config.train + config.search + config.report + config.test
    return 5 * number * channels * config.image_size**2


def estimate(kind: str, config: Any) -> Estimate:
    """Estimate what one record costs; its configuration says by its fields what it does.

    Supernets have a ``space`` and epochs, policies ``updates`` and a supernet, networks trained
    from scratch a ``genotype`` and epochs, all others evaluate genotypes with a supernet's weights.
    Where ``space`` is the name of a table, looking things up costs next to nothing. What has none
    of these is ``unknown``. Raises NatlibError where a network built is not what
    ``natlib.cost`` counts.
    """
    has = frozenset(n for n in dir(config) if not n.startswith("_")).issuperset
    if isinstance(getattr(config, "space", None), str):
        return Estimate()
    if has({"epochs", "space", "macro"}):
        count, memory, madds = _supernet(config.space, config.macro, config.batch)
        data = config.data
        looks = config.snapshots * config.watched * data.report
        return Estimate(
            {(config.space, config.macro): count},
            trainings=1,
            madds=madds * (3 * data.train * config.epochs + looks),
            memory=memory + _images(data, config.macro.image_channels),
            disk=4 * count * (config.snapshots + 2),
        )
    if has({"epochs", "genotype", "macro"}):
        return _trained(config)
    if not has({"supernet"}):
        return Estimate(unknown=(kind,))
    whole = config.supernet
    count, memory, madds = _supernet(whole.space, whole.macro, whole.batch)
    memory += _images(whole.data, whole.macro.image_channels)
    found = Estimate({(whole.space, whole.macro): count}, memory=memory)
    if has({"updates", "rollouts", "gcn"}):
        rule = by_name(config.transitions, whole.space.primitives)
        logits = build_logits(len(rule.primitives), config.gcn, torch.Generator().manual_seed(0))
        assert isinstance(logits, nn.Module)
        policy = parameter_count(logits.parameters())
        looks = config.updates * config.architectures * (1 + config.rollouts)
        return found + Estimate(
            {config.gcn: policy},
            trainings=1,
            madds=madds * looks * config.reward_images,
            disk=16 * policy,
        )
    given = getattr(config, "genotypes", 1)
    number = given if isinstance(given, int) else len(given)
    policies = len(getattr(config, "policies", ()))
    if has({"samples"}):
        methods = policies + (getattr(config, "nao", None) is not None) or 1
        images = (config.samples + 1) * methods * whole.data.search + 2 * whole.data.report
    elif has({"genotypes"}):
        methods = 1 + 2 * policies + len(getattr(config, "random", ()))
        images = methods * getattr(config, "images", whole.data.report)
    else:
        return found + Estimate(unknown=(kind,))
    return found + Estimate(madds=madds * number * images)


def _in_order(genotype: Genotype) -> Genotype:
    """The genotype with the edges of each node in a fixed order, which changes no cost."""
    return Genotype(
        *(
            replace(c, edges=tuple(e for group in c.in_edges for e in sorted(group, key=repr)))
            for _, c in genotype.cells
        )
    )


def _trained(config: Any) -> Estimate:
    """A network trained from scratch, on the images of a ``DataConfig``, or on ImageNet."""
    macro, genotype, head = config.macro, config.genotype, bool(getattr(config, "auxiliary", 0))
    count, memory = standalone(_in_order(genotype), macro, head, config.batch)
    madds = network_cost(genotype, macro).madds
    if head:
        madds += auxiliary_cost(genotype, macro).madds
    data = getattr(config, "data", None)
    if isinstance(data, DataConfig):
        memory += _images(data, macro.image_channels)
        train, looks = data.train, data.report + data.test
    elif hasattr(config, "train_images"):
        train, looks = config.train_images, config.test_images
    else:
        train, looks = IMAGENET["train"], IMAGENET["val"]
    network = (genotype, macro)
    return Estimate(
        {network: count},
        published=frozenset([network] if _published().get(network) else []),
        trainings=1,
        madds=madds * (3 * train * config.epochs + looks),
        memory=memory,
        disk=4 * count,
    )


def data_bytes(configs: Iterable[Any]) -> int:
    """Bytes of the data sets behind configurations, on disk and as they are decoded there."""
    names = {c.data.dataset for c in configs if isinstance(getattr(c, "data", None), DataConfig)}
    streamed = any(isinstance(getattr(c, "macro", None), ImageNetMacro) for c in configs)
    return len(names) * 2 * 60_000 * 3 * 32**2 + streamed * IMAGENET_BYTES
