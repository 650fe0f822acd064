"""Measure speed on this machine: a table, and runs/bench.json.

"Plain" is the same mathematics written literally, as the papers' released code does it: an
operation at a time on contiguous tensors (tests/plain_network.py), rewards with gradients recorded,
the policy one cell a call, images one at a time through torchvision. Ours and plain are measured
in turn with the same architectures, weights and images (made ones: speed does not depend on what
they show), so their ratio holds where absolute figures drift. Plain networks run in a process of
their own, with memory as the C library manages it by itself; one of the two processes works, the
other waits.

Operations are twice the exact multiply-adds of natlib.cost (three forward passes for a training
step), or counted as matrix products for the policy; bytes are what every operation must read and
write once. Shares are of what this machine's own matrix product and memory copy reach.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from experiments import RUNS, STATE, exit_with, parameters_at, read_experiments, require, write_text
from measure import (
    Elsewhere,
    Spread,
    Work,
    alternate,
    manage_memory_as_usual,
    memory,
    peaks,
    power_law,
    processes,
    traffic,
)
from torch import Tensor
from torch.nn import functional as F

from natlib import NatlibError, __version__, zoo
from natlib.cost import network_cost
from natlib.files import read_json
from natlib.genotype import Genotype
from natlib.handcrafted import MACROS, ORIGINALS, scaled
from natlib.macro import BlockMacro, Macro, MacroConfig
from natlib.network import CellNetwork
from natlib.policy import CellBatch, GCNConfig, GCNLogits, Policy
from natlib.primitives import PRIMITIVES
from natlib.records import cpu_model, git_state, peak_memory_mb
from natlib.search import SpaceConfig, policy_step, random_policy, supernet_reward
from natlib.train import accuracies, augmented, sgd, sgd_step
from natlib.transitions import by_name

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.plain_network import blocks_forward as plain_blocks_forward
from tests.plain_network import policy_logits as plain_policy_logits
from tests.plain_network import supernet_forward as plain_forward

TARGET = RUNS / "bench.json"
REFERENCE = Path("results/bench/reference.json")
QUIET = 0.5
"""Load average (processes that want a core) above which other work disturbs the figures."""
RATE, CLIP, CANDIDATE = 1e-3, 5.0, 10_000

# What is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A setting: the network, images a training step, images a reward."""

    name: str
    macro: Macro
    nodes: int
    batch: int
    reward: int


@dataclass(frozen=True)
class Plan:
    """What the figures are taken with, and how long: full or quick (``--quick``)."""

    quick: bool
    sizes: tuple[Size, ...]  # of the supernet: published first
    scratch: tuple[tuple[str, Size], ...]
    seconds: float = 3.0
    rounds: int = 3
    architectures: int = 4
    matrix: int = 2048
    megabytes: int = 512
    derive_images: int = 125
    cells: tuple[int, ...] = (3, 6, 9, 12, 18)
    channels: tuple[int, ...] = (8, 12, 16, 24, 32, 48)
    policy_genotypes: tuple[int, ...] = (1, 4, 16, 64, 128, 256)
    rollouts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    base: MacroConfig = field(default_factory=lambda: MacroConfig(channels=8, cells=6))
    imports: int = 5

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads to measure with."""
        return (1, 2) if (os.cpu_count() or 1) > 1 else (1,)

    def set_threads(self, count: int) -> None:
        """Compute with ``count`` threads; a quick run with one, for its cores may be busy."""
        torch.set_num_threads(1 if self.quick else count)


def full_plan() -> Plan:
    """The published setting, and the reduced one as experiments.yml has it."""
    experiments = read_experiments()
    reduced = parameters_at(experiments, "04_policy", "reduced")
    training = parameters_at(experiments, "03_supernet", "reduced")["training"]
    size = Size(
        "reduced",
        MacroConfig(**reduced["macro"], image_size=reduced["images"]["image_size"]),
        max(reduced["space"]["nodes"]),
        reduced["supernet"]["batch"],
        reduced["policy"]["reward_images"],
    )
    width = parameters_at(experiments, "table_1_handcrafted", "reduced")["comparison"]["width"]
    resnet = scaled(MACROS["ResNet20", "CIFAR-10"], width, 10, size.macro.image_size)
    return Plan(
        quick=False,
        sizes=(Size("published", MacroConfig(channels=20, cells=8), 4, 64, 64), size),
        scratch=(
            # A third of the published batch of 96, to save time. Fewer than 16 would be something
            # else: PyTorch then computes 1x1 convolutions in another way.
            ("DARTS", Size("published", MacroConfig(channels=36, cells=20), 4, 32, 0)),
            ("DARTS", replace(size, batch=training["batch"])),
            ("ResNet20", Size("published", MACROS["ResNet20", "CIFAR-10"], 4, 32, 0)),
            ("ResNet20", replace(size, macro=resnet, batch=training["batch"])),
        ),
    )


def quick_plan() -> Plan:
    """Every figure in seconds, at sizes that say nothing about speed: for tests."""
    tiny = Size("published", MacroConfig(4, 3, image_size=8), 4, 4, 4)
    resnet = scaled(MACROS["ResNet20", "CIFAR-10"], 0.25, 10, 8)
    return Plan(
        quick=True,
        sizes=(tiny, replace(tiny, name="reduced", nodes=5)),
        scratch=tuple(
            (name, replace(tiny, name=size, macro=macro))
            for name, macro in (("DARTS", tiny.macro), ("ResNet20", resnet))
            for size in ("published", "reduced")
        ),
        seconds=0.0,
        rounds=2,
        architectures=1,
        matrix=128,
        megabytes=2,
        derive_images=8,
        cells=(3, 6),
        channels=(4, 8),
        policy_genotypes=(1, 8),
        rollouts=(1, 4),
        base=MacroConfig(4, 3, image_size=8),
        imports=2,
    )


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    ``ours`` and ``plain`` in ``unit``; ``ratio`` says how many times better ours is; ``target`` is
    the ratio aimed at. ``roofline`` has for each version what it reaches: ``gflops`` and ``gbs``
    (G operations and G bytes a second), ``intensity`` (operations a byte), and shares ``of_matmul``
    and ``of_copy`` of the peaks with as many threads.
    """

    group: str
    name: str
    size: str
    threads: int
    unit: str
    ours: Spread
    plain: Spread | None = None
    ratio: Spread | None = None
    target: float | None = None
    roofline: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""


class Bench:
    """The figures measured so far, and the peaks to compare them with."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.peaks: dict[int, dict[str, Spread]] = {}
        self.figures: list[Figure] = []
        self.curves: list[dict[str, Any]] = []

    def measure_peaks(self) -> None:
        """Measure matrix product and memory copy, and print them."""
        plan = self.plan
        for threads in plan.threads:
            plan.set_threads(threads)
            found = peaks(plan.seconds / 3, 3, plan.matrix, plan.megabytes)
            self.peaks[threads] = found
            print(
                f"{_threads(threads)}: matrix product {found['matmul'].median:,.0f} GFLOP/s, copy "
                f"{found['copy'].median:.1f} GB/s in memory, {found['cache'].median:.0f} in cache"
            )

    def add(self, figure: Figure) -> None:
        """Keep a figure and print its line."""
        self.figures.append(figure)
        print(line(figure), flush=True)

    def timed(
        self,
        group: str,
        name: str,
        size: str,
        unit: str,
        times: dict[str, list[float]],
        amount: float,
        *,
        threads: int = 1,
        flops: float = 0.0,
        moved: dict[str, int] | None = None,
        target: float | None = None,
        note: str = "",
    ) -> None:
        """Add a figure from the seconds of each round, in which ``amount`` units are done.

        ``times`` has "ours" and "plain"; ``flops`` operations and ``moved`` bytes are those of a
        round. A figure in seconds is for one unit, any other counts units a second.
        """
        values = {
            version: Spread.of(s / amount if unit == "s" else amount / s for s in seconds)
            for version, seconds in times.items()
        }
        pairs = zip(times["ours"], times["plain"], strict=True)
        peak = self.peaks[threads]
        roofline = {}
        for version, count in (moved or {}).items():
            seconds = statistics.median(times[version])
            gflops, gbs = flops / seconds / 1e9, count / seconds / 1e9
            roofline[version] = {
                "gflops": gflops,
                "gbs": gbs,
                "intensity": flops / count,
                "of_matmul": gflops / peak["matmul"].median,
                "of_copy": gbs / peak["copy"].median,
            }
        ratio = Spread.of(plain / ours for ours, plain in pairs)
        ours, plain = values["ours"], values["plain"]
        figure = Figure(
            group, name, size, threads, unit, ours, plain, ratio, target, roofline, note
        )  # fmt: skip
        self.add(figure)

    def beside(
        self,
        make: Callable[[Size, Sequence[Genotype], bool], list[Work]],
        size: Size,
        genotypes: Sequence[Genotype],
    ) -> Iterator[tuple[int, dict[str, list[float]], dict[str, int], str]]:
        """Time what ``make`` returns for ours and plain; yield threads, seconds, bytes moved, how.

        On two cores ours is tried by two processes with a thread each, too, as notebooks work.
        """
        plan = self.plan
        torch.set_num_threads(1)
        ours = make(size, genotypes, False)
        with (
            Elsewhere(make, size, genotypes, True) as plain,
            Elsewhere(make, size, genotypes, False, usual_memory=False) as other,
        ):
            moved = {"ours": traffic(ours), "plain": plain.traffic()}

            def both(k: int) -> None:
                torch.set_num_threads(1)
                other.begin(k)
                ours[k]()
                other.finish()
                plan.set_threads(2)

            for count in plan.threads:
                plan.set_threads(count)
                plain.set_threads(torch.get_num_threads())
                works = {"ours": ours, "plain": plain.works}
                how = ""
                if count == 2:
                    works["workers"] = [partial(both, k) for k in range(len(ours))]
                    works["workers"][0]()
                times = alternate(works, plan.seconds, plan.rounds)
                if count == 2:
                    how = better_on_two(times)
                yield count, times, moved, how


def better_on_two(times: dict[str, list[float]]) -> str:
    """Let "ours" be the better of itself and of "workers", who do twice as much; say which."""
    workers = [t / 2 for t in times.pop("workers")]
    faster = Spread.of(workers).median < Spread.of(times["ours"]).median
    if faster:
        times["ours"] = workers
    return "; ours: " + ("two processes, a thread each" if faster else "one process, two threads")


# Networks, images and steps ------------------------------------------------------------------


def random_genotypes(nodes: int, count: int) -> list[Genotype]:
    """Return architectures as supernet training draws them, all nodes concatenated."""
    generator = torch.Generator().manual_seed(0)
    return [SpaceConfig((nodes,)).sample(generator) for _ in range(count)]


def made_images(macro: Macro, count: int, plain: bool) -> tuple[Tensor, Tensor]:
    """Return noise for images, in the memory format of either version, and labels."""
    generator = torch.Generator().manual_seed(0)
    side = macro.image_size
    images = torch.randn(count, macro.image_channels, side, side, generator=generator)
    labels = torch.randint(macro.classes, (count,), generator=generator)
    if not plain:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels


def make_network(size: Size, genotype: Genotype | None, plain: bool) -> CellNetwork:
    """Return a supernet, or the standalone network of ``genotype``, for either version."""
    if genotype is None:
        network = CellNetwork(size.macro, nodes=size.nodes, primitives=PRIMITIVES)
    else:
        network = CellNetwork(size.macro, genotype=genotype)
    # The plain network's weights are contiguous, so that it spends no time on making them so.
    return network.to(memory_format=torch.contiguous_format) if plain else network


def training_steps(
    size: Size, genotypes: Sequence[Genotype], plain: bool, standalone: bool = False
) -> list[Work]:
    """Return training steps, one for each genotype: forward, backward, clip, SGD."""
    network = make_network(size, genotypes[0] if standalone else None, plain)
    images, labels = made_images(size.macro, size.batch, plain)
    if plain:
        optimizer = torch.optim.SGD(network.parameters(), RATE, 0.9, weight_decay=3e-4)
    else:
        optimizer = sgd(network, 0.9, 3e-4)

    def ours(genotype: Genotype) -> None:
        logits = network(images, None if standalone else genotype)
        sgd_step(optimizer, F.cross_entropy(logits, labels), RATE, CLIP)

    def literal(genotype: Genotype) -> None:
        blocks = isinstance(size.macro, BlockMacro)
        forward = plain_blocks_forward if blocks else partial(plain_forward, genotype=genotype)
        loss = F.cross_entropy(forward(network, images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()

    return [partial(literal if plain else ours, genotype) for genotype in genotypes]


def scratch_steps(size: Size, genotypes: Sequence[Genotype], plain: bool) -> list[Work]:
    """Return a training step of the standalone network of the one genotype."""
    return training_steps(size, genotypes, plain, standalone=True)


def plain_accuracy(
    network: CellNetwork, images: Tensor, labels: Tensor, genotype: Genotype, batch: int
) -> float:
    """Return the accuracy, batch by batch, gradients recorded as in the released code."""
    right = 0
    for x, y in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
        right += int((plain_forward(network, x, genotype).argmax(1) == y).sum())
    return right / len(labels)


def reward_evaluations(size: Size, genotypes: Sequence[Genotype], plain: bool) -> list[Work]:
    """Return rewards, one for each pair of genotypes."""
    network = make_network(size, None, plain)
    images, labels = made_images(size.macro, size.reward, plain)
    pairs = list(zip(genotypes[::2], genotypes[1::2], strict=True))
    if not plain:
        reward = supernet_reward(network, images, labels)
        return [partial(reward, [before], [after]) for before, after in pairs]

    def literal(before: Genotype, after: Genotype) -> float:
        values = [plain_accuracy(network, images, labels, g, size.batch) for g in (after, before)]
        return values[0] - values[1]

    return [partial(literal, *pair) for pair in pairs]


@lru_cache(maxsize=2)
def evaluation(size: Size, count: int, plain: bool) -> tuple[CellNetwork, Tensor, Tensor]:
    """Return a supernet and images to evaluate on; kept, also in worker processes."""
    return make_network(size, None, plain), *made_images(size.macro, count, plain)


def evaluate(size: Size, count: int, plain: bool, genotypes: Sequence[Genotype]) -> list[float]:
    """Evaluate candidates as derive does."""
    network, images, labels = evaluation(size, count, plain)
    if plain:
        return [plain_accuracy(network, images, labels, g, size.batch) for g in genotypes]
    return accuracies(network, images, labels, genotypes)


def plain_evaluations(size: Size, count: int, families: Sequence[Sequence[Genotype]]) -> list[Work]:
    """Return the plain evaluation of each family of candidates."""
    return [partial(evaluate, size, count, True, family) for family in families]


def rewritings(genotypes: Sequence[Genotype], count: int) -> list[list[Genotype]]:
    """Return each genotype with ``count`` rewritings of it, by random NAT++ transitions."""
    policy = random_policy("natpp", SpaceConfig())
    generator = torch.Generator().manual_seed(0)
    return [[g, *policy.sample([g] * count, generator).genotypes] for g in genotypes]


def forward_flops(genotypes: Sequence[Genotype], macro: Macro) -> float:
    """Return the operations of a forward pass of one image through each genotype."""
    return 2.0 * sum(network_cost(g, macro).madds for g in genotypes)


# Figures -------------------------------------------------------------------------------------


def supernet(bench: Bench) -> None:
    """Training of shared weights."""
    plan = bench.plan
    for size in plan.sizes:
        genotypes = random_genotypes(size.nodes, plan.architectures)
        flops = 3 * size.batch * forward_flops(genotypes, size.macro)
        for threads, times, moved, how in bench.beside(training_steps, size, genotypes):
            bench.timed(
                "supernet", "supernet training step", size.name, "images/s", times,
                size.batch * len(genotypes), threads=threads, flops=flops, moved=moved, target=2.0,
                note=f"{len(genotypes)} random architectures, {size.batch} images a step{how}",
            )  # fmt: skip


def rewards(bench: Bench) -> None:
    """Rewards: two architectures on the same images."""
    plan = bench.plan
    for size in plan.sizes:
        inputs = random_genotypes(size.nodes, plan.architectures)
        genotypes = [g for pair in rewritings(inputs, 1) for g in pair]
        flops = size.reward * forward_flops(genotypes, size.macro)
        for threads, times, moved, how in bench.beside(reward_evaluations, size, genotypes):
            bench.timed(
                "rewards", "reward evaluation", size.name, "images/s", times,
                size.reward * plan.architectures, threads=threads, flops=flops, moved=moved,
                target=3.5,
                note=f"{size.reward} images a reward, an architecture and a rewriting on each{how}",
            )  # fmt: skip


def derive(bench: Bench) -> None:
    """Scoring of candidates: an input with ten random rewritings, as derive scores them.

    Plain scores two of them. On two cores ours is tried by two processes with a thread each, too.
    """
    plan = bench.plan
    for size in plan.sizes:
        count = plan.derive_images * (1 if size is plan.sizes[0] else 4)
        fewer = max(1, count // 2)  # plain is slow, and its time is proportional
        families = rewritings(random_genotypes(size.nodes, max(1, plan.architectures // 2)), 10)
        pairs = [family[:2] for family in families]
        ours: list[Work] = [partial(evaluate, size, count, False, f) for f in families]
        # What one candidate of each family takes.
        each, plain_each = len(families[0]), len(pairs[0])
        flops = count * sum(forward_flops(f, size.macro) for f in families) / each
        torch.set_num_threads(1)
        with processes(2) as pool, Elsewhere(plain_evaluations, size, fewer, pairs) as plain:
            moved = {
                "ours": traffic(ours) // each,
                "plain": plain.traffic() * count // fewer // plain_each,
            }

            def both(size: Size, count: int, family: Sequence[Genotype]) -> None:
                jobs = [pool.submit(evaluate, size, count, False, family) for _ in range(2)]
                for job in jobs:
                    job.result()

            for threads in plan.threads:
                plan.set_threads(threads)
                plain.set_threads(torch.get_num_threads())
                works = {"ours": ours, "plain": plain.works}
                if threads == 2:
                    works["workers"] = [partial(both, size, count, f) for f in families]
                    works["workers"][0]()
                times = alternate(works, plan.seconds, plan.rounds)
                times = {name: [t / each for t in taken] for name, taken in times.items()}
                times["plain"] = [t * each / plain_each * count / fewer for t in times["plain"]]
                note = f"one of 11; 10,000 images; measured on {count} (plain on {fewer}), scaled"
                if threads == 2:
                    note += better_on_two(times)
                bench.timed(
                    "derive", "derive, one candidate", size.name, "s", times,
                    len(families) * count / CANDIDATE, threads=threads, flops=flops, moved=moved,
                    target=4.0, note=note,
                )  # fmt: skip


def make_policy(fused: bool = True) -> tuple[Policy, torch.optim.Optimizer, torch.Generator]:
    """Return a policy of the published sizes, its optimizer (ours is fused), and a generator."""
    generator = torch.Generator().manual_seed(0)
    logits = GCNLogits(len(PRIMITIVES), GCNConfig(), generator)
    optimizer = torch.optim.Adam(logits.parameters(), lr=3e-4, fused=fused)
    return Policy(logits, by_name("natpp")), optimizer, generator


def no_reward(before: Sequence[Genotype], after: Sequence[Genotype]) -> list[float]:
    """Give no reward at no cost, to measure the policy alone."""
    return [1.0] * len(after)


def single_cells(policy: Policy, genotype: Genotype) -> Iterator[CellBatch]:
    """Yield the genotype's two cells as batches of one."""
    both = policy.encode([genotype])
    for k in range(2):
        yield CellBatch(
            both.primitives[k : k + 1],
            both.sources[k : k + 1],
            both.present[k : k + 1],
            both.reduction[k : k + 1],
        )


def policy_update(genotypes: Sequence[Genotype], rollouts: int = 1) -> Work:
    """Return an update of a policy on all genotypes at once."""
    policy, optimizer, generator = make_policy()
    arguments = (genotypes, rollouts, no_reward, None, 3e-3, 0.99, generator)
    return partial(policy_step, policy, optimizer, *arguments)


def policies(bench: Bench) -> None:
    """The policy alone: 256 cells a call beside one cell a call."""
    # Imported late: it takes 75 MB, which would count as memory of what is measured.
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    plan = bench.plan
    genotypes = random_genotypes(4, 128 if not plan.quick else 8)
    one_by_one = genotypes[:8]
    share = len(genotypes) / len(one_by_one)
    policy, optimizer, generator = make_policy(fused=False)
    assert isinstance(policy.logits, GCNLogits)
    plain = Policy(partial(plain_policy_logits, policy.logits), policy.transitions)

    def forward() -> None:
        policy.log_probabilities(policy.encode(genotypes))

    def forward_singly() -> None:
        for genotype in one_by_one:
            for cell in single_cells(policy, genotype):
                plain.log_probabilities(cell)

    def update_singly() -> None:
        # As released: an update for each architecture, each of its two cells on its own.
        for genotype in one_by_one:
            gains = []
            for cell in single_cells(policy, genotype):
                logp = plain.log_probabilities(cell)
                p = logp.exp()
                actions = torch.multinomial(p.detach().flatten(0, 2), 1, generator=generator)
                chosen = logp.flatten(0, 2).gather(1, actions).sum()
                entropy = -(p * logp.masked_fill(torch.isinf(logp), 0)).sum()
                gains.append(chosen + 3e-3 * entropy)
            optimizer.zero_grad()
            (-torch.stack(gains).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    cases: dict[str, tuple[Work, Work, float | None]] = {
        "policy, forward": (forward, forward_singly, None),
        "policy, update": (policy_update(genotypes), update_singly, 100.0),
    }
    for name, (ours, singly, target) in cases.items():
        moved = {"ours": traffic([ours]), "plain": int(traffic([singly]) * share)}
        with FlopCounterMode(display=False) as counter:
            ours()
        times = alternate({"ours": [ours], "plain": [singly]}, plan.seconds, plan.rounds)
        times["plain"] = [t * share for t in times["plain"]]
        cells = 2 * len(genotypes)
        bench.timed(
            "policy", name, f"{cells} cells a call", "cells/s", times, cells,
            flops=float(counter.get_total_flops()), moved=moved, target=target,
            note="plain: one cell a call, an update for each architecture",
        )  # fmt: skip


def scratch(bench: Bench) -> None:
    """Training of a standalone network."""
    plan = bench.plan
    for name, size in plan.scratch:
        genotypes = [ORIGINALS.get(name) or zoo.get(name)]
        flops = 3 * size.batch * forward_flops(genotypes, size.macro)
        madds = forward_flops(genotypes, size.macro) / 2e6
        note = f"{madds:.3g} million multiply-adds an image, {size.batch} images a step"
        for threads, times, moved, how in bench.beside(scratch_steps, size, genotypes):
            bench.timed(
                "scratch", f"training {name}", size.name, "images/s", times, size.batch,
                threads=threads, flops=flops, moved=moved, target=2.0, note=note + how,
            )  # fmt: skip


def pipeline(bench: Bench) -> None:
    """Gathering, augmentation and normalisation of a batch."""
    import torchvision.transforms as transforms
    from PIL import Image

    torch.set_num_threads(1)
    size = bench.plan.sizes[0]
    side = size.macro.image_size
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (1000, 3, side, side), generator=generator, dtype=torch.uint8)
    middle = torch.full((3,), 0.5)
    index = torch.randperm(len(raw), generator=generator)[: size.batch]
    kept = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in raw]
    one_by_one = transforms.Compose(
        [
            transforms.RandomCrop(side, padding=side // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    works: dict[str, list[Work]] = {
        "ours": [lambda: augmented(raw[index], middle, middle, generator)],
        "plain": [lambda: torch.stack([one_by_one(kept[int(i)]) for i in index])],
    }
    moved = {"ours": traffic(works["ours"])}
    works["plain"][0]()
    times = alternate(works, bench.plan.seconds / 2, bench.plan.rounds)
    bench.timed(
        "data", "data: gather, crop, flip, normalise", size.name, "images/s", times, size.batch,
        moved=moved, note="plain: torchvision's transforms of single PIL images",
    )  # fmt: skip


def imports(bench: Bench) -> None:
    """Import times, in fresh processes of the interpreter, in turn."""
    names = ("natlib", "torch", "natlib.search")
    found: dict[str, list[float]] = {name: [] for name in names}
    used: list[float] = []
    quick = bench.plan.quick
    for attempt in range(bench.plan.imports + (not quick)):
        for name in names:
            code = (
                f"import time; start = time.perf_counter(); import {name}; "
                "took = time.perf_counter() - start; from natlib.records import peak_memory_mb; "
                "print(took, peak_memory_mb())"
            )
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            )
            took, memory_mb = map(float, done.stdout.split())
            if attempt or quick:  # the first brings the files into the system's cache
                found[name].append(took)
                used += [memory_mb] if name == "natlib.search" else []
    for name in names:
        note = "PyTorch alone, for comparison" if name == "torch" else ""
        bench.add(Figure("import", f"import {name}", "", 1, "s", Spread.of(found[name]), note=note))
    bench.add(Figure("import", "memory after that import", "", 1, "MB", Spread.of(used)))


def step_memory(size: Size, count: int, plain: bool) -> tuple[float, float]:
    """Return memory before and at the peak of supernet training, in MB (for a fresh process).

    Plain training gets memory that is managed as usual, as in ``measure.Elsewhere``.
    """
    if plain:
        manage_memory_as_usual()
    return memory(training_steps, size, random_genotypes(size.nodes, count), plain)


def peak_memory(bench: Bench) -> None:
    """Peak memory of supernet training, in fresh processes."""
    plan = bench.plan
    size = plan.sizes[0]
    found: dict[bool, list[float]] = {}
    with processes(1, fresh=True, forked=False) as pool:
        for literal in (False, True):
            jobs = [pool.submit(step_memory, size, plan.architectures, literal) for _ in range(2)]
            found[literal] = [job.result()[1] for job in jobs]
    ours, plain = found[False], found[True]
    ratio = Spread.of(b / a for a, b in zip(ours, plain, strict=True))
    figure = Figure(
        "memory", "peak memory, supernet training step", size.name, 1, "MB", Spread.of(ours),
        Spread.of(plain), ratio, 1.0, note="resident, the Python process included",
    )  # fmt: skip
    bench.add(figure)


# Scaling -------------------------------------------------------------------------------------


def scaled_work(along: str, value: int, plan: Plan) -> list[Work]:
    """Return work whose amount grows with ``value``."""
    base = plan.base
    if along in ("cells", "channels"):
        macro = replace(base, **{along: value})
        size = Size(along, macro, 4, 16 if not plan.quick else 2, 0)
        return training_steps(size, random_genotypes(4, plan.architectures), plain=False)
    if along == "architectures":
        return [policy_update(random_genotypes(4, value))]
    size = Size(along, base, 4, 0, 64 if not plan.quick else 4)
    network = make_network(size, None, plain=False)
    reward = supernet_reward(network, *made_images(base, size.reward, plain=False))
    policy, optimizer, generator = make_policy()
    arguments = (random_genotypes(4, 1), value, reward, None, 3e-3, 0.99, generator)
    return [partial(policy_step, policy, optimizer, *arguments)]


def scaled_memory(along: str, value: int, plan: Plan) -> float:
    """Return the memory that the work needs beyond the process itself, in MB."""
    start, peak = memory(scaled_work, along, value, plan)
    return peak - start


def scaling(bench: Bench) -> None:
    """Time and memory as the work grows, with fitted exponents."""
    torch.set_num_threads(1)
    plan = bench.plan
    curves = {
        "cells": ("supernet training step", plan.cells),
        "channels": ("supernet training step", plan.channels),
        "architectures": ("policy update without rewards", plan.policy_genotypes),
        "rollouts": ("policy update with rewards", plan.rollouts),
    }
    for along, (name, values) in curves.items():
        with processes(1, fresh=True) as pool:
            jobs = [pool.submit(scaled_memory, along, value, plan) for value in values]
            megabytes = [max(job.result(), 0.1) for job in jobs]
        seconds = []
        for value in values:
            works = scaled_work(along, value, plan)
            for work in works:
                work()
            found = alternate({"": works}, plan.seconds / 4, plan.rounds)[""]
            seconds.append(Spread.of(t / len(works) for t in found))
        curve: dict[str, Any] = {
            "name": name,
            "along": along,
            "values": list(values),
            "seconds": [asdict(spread) for spread in seconds],
            "memory_mb": megabytes,
            "exponents": {
                "seconds": asdict(power_law(values, [s.median for s in seconds])),
                "memory_mb": asdict(power_law(values, megabytes)),
            },
        }
        if along in ("cells", "channels"):
            genotypes = random_genotypes(4, plan.architectures)
            curve["madds"] = [
                forward_flops(genotypes, replace(plan.base, **{along: v})) / 2 / len(genotypes)
                for v in values
            ]
            curve["exponents"]["madds"] = asdict(power_law(values, curve["madds"]))
        bench.curves.append(curve)
        fits = ", ".join(
            f"{what} {fit['exponent']:.2f}" for what, fit in curve["exponents"].items()
        )
        print(f"{name} against {along} ({values[0]} to {values[-1]}): exponents of {fits}")


GROUPS: dict[str, Callable[[Bench], None]] = {
    "memory": peak_memory,
    "supernet": supernet,
    "rewards": rewards,
    "derive": derive,
    "policy": policies,
    "scratch": scratch,
    "data": pipeline,
    "import": imports,
    "scaling": scaling,
}

# The command line ----------------------------------------------------------------------------


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(figure: Figure) -> str:
    """Return a figure's line of the table."""
    ours = figure.ours
    spread = f"[{_number(ours.low)}, {_number(ours.high)}]"
    text = f"{figure.name:<38}{figure.size:<17}{figure.threads:>2}{_number(ours.median):>11}"
    text += f" {figure.unit:<9}{spread:<19}"
    if figure.plain and figure.ratio:
        text += f"{_number(figure.plain.median):>9}{figure.ratio.median:>8.2f}x"
        text += f"{f'{figure.target:g}x' if figure.target else '':>7}"
    if reached := figure.roofline.get("ours"):
        text = f"{text:<113}{reached['gflops']:>7.1f}{reached['of_matmul']:>6.0%}"
        text += f"{reached['gbs']:>7.1f}{reached['of_copy']:>6.0%}{reached['intensity']:>6.1f}"
    return text.rstrip()


HEADER = (
    f"{'':<55}{'':>2}{'ours':>11} {'':<9}{'quartiles':<19}{'plain':>9}{'ratio':>9}{'target':>7}"
    f"  {'GFLOP/s':>7}{'share':>6}{'GB/s':>7}{'share':>6}{'FLOP/B':>7}"
)


def accept() -> int:
    """Make this machine's figures the committed reference."""
    if not TARGET.is_file():
        raise NatlibError(f"there is no {TARGET}: run `make bench` first")
    content = read_json(TARGET)
    if content["quick"]:
        raise NatlibError(f"{TARGET} is of a quick run, which says nothing: run `make bench`")
    write_text(REFERENCE, json.dumps(content, indent=1) + "\n")
    print(f"{REFERENCE} now holds the figures of {content['date']} ({content['machine']['cpu']})")
    if content["machine"]["load"][0] > QUIET:
        print(f"warning: they were taken at load average {content['machine']['load'][0]:.2f}")
    return 0


def measure(plan: Plan, groups: Sequence[str]) -> Bench:
    """Take the figures of the given groups, printing each."""
    gc.freeze()  # as worker processes do
    bench = Bench(plan)
    bench.measure_peaks()
    print(HEADER)
    for group in groups:
        GROUPS[group](bench)
    return bench


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--only", metavar="GROUP", help=f"one of {', '.join(GROUPS)}; no JSON")
    parser.add_argument(
        "--accept", action="store_true", help=f"make {TARGET} the reference, {REFERENCE}"
    )
    arguments = parser.parse_args()
    if arguments.accept:
        return accept()
    if arguments.only:
        require(arguments.only, GROUPS, "--only")
    load = os.getloadavg()
    plan = quick_plan() if arguments.quick else full_plan()
    print(f"{cpu_model()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if load[0] > QUIET and not plan.quick:
        print(
            f"warning: load average {load[0]:.2f}; other work disturbs these figures "
            f"(quiet is below {QUIET})"
        )
    started = time.perf_counter()
    bench = measure(plan, [arguments.only] if arguments.only else list(GROUPS))
    seconds = time.perf_counter() - started
    print(f"took {seconds:.0f} s")
    if arguments.only:
        return 0
    content = {
        "quick": plan.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **git_state(),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load": [round(value, 2) for value in load],
            "load_after": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "natlib": __version__,
        },
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "peaks": {
            str(threads): {name: asdict(spread) for name, spread in found.items()}
            for threads, found in bench.peaks.items()
        },
        "figures": [asdict(figure) for figure in bench.figures],
        "scaling": bench.curves,
    }
    write_text(TARGET, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if not plan.quick:
        # The page that shows them runs again.
        (STATE / "figure_speed.hash").unlink(missing_ok=True)
    print(f"written to {TARGET}; to make it the committed reference, {REFERENCE}:")
    print("  .venv/bin/python scripts/bench.py --accept")
    return 0


if __name__ == "__main__":
    exit_with(main)
