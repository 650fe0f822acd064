"""Measure speed on this machine: a table, and runs/bench.json.

Each figure is the median over repetitions for a few seconds, on made images of the published size
(3 x 32 x 32). Shares are multiply-adds done a second, counted from the network's cost (a training
step as three forward passes), of what a large float32 matrix product reaches here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from experiments import RUNS, exit_with, write_text
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from natlib import data, zoo
from natlib.cost import network_cost
from natlib.genotype import Genotype
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.policy import GCNConfig, GCNLogits, Policy
from natlib.primitives import PRIMITIVES
from natlib.records import cpu_model
from natlib.search import SpaceConfig, policy_step
from natlib.train import accuracy, sgd, sgd_step
from natlib.transitions import by_name

SIZES = {
    "published": (MacroConfig(channels=20, cells=8), 64),
    "small": (MacroConfig(channels=8, cells=5), 16),
}
SECONDS = 2.0


@dataclass(frozen=True)
class Figure:
    """One measured figure; ``share`` of the matrix product's speed where that has a meaning."""

    name: str
    value: float
    unit: str
    share: float | None = None


def median_seconds(work: Callable[[], object]) -> float:
    """Return the median time of ``work``, after one call that is not counted."""
    work()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_product() -> float:
    """Return multiply-adds a second of a 1024 x 1024 float32 matrix product."""
    a, b = torch.randn(2, 1024, 1024)
    return float(1024**3 / median_seconds(lambda: a @ b))


def random_genotypes(count: int) -> list[Genotype]:
    """Return ``count`` architectures drawn as in training."""
    generator = torch.Generator().manual_seed(0)
    return [SpaceConfig().sample(generator) for _ in range(count)]


def made_images(count: int) -> tuple[Tensor, Tensor]:
    """Return normal noise for images, channels last, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def train(network: CellNetwork, optimizer: SGD, given: Sequence[Genotype | None], n: int) -> None:
    """Take one step of ``n`` images with each of the given genotypes."""
    images, labels = made_images(n)
    for genotype in given:
        loss = F.cross_entropy(network(images, genotype), labels)
        sgd_step(network, optimizer, loss, 0.01, 5.0)


def mean_madds(genotypes: Sequence[Genotype], macro: MacroConfig) -> float:
    """Return the mean multiply-adds of a forward pass on one image."""
    return statistics.mean(network_cost(g, macro).madds for g in genotypes)


def supernet(size: str, peak: float) -> list[Figure]:
    """Measure training of shared weights, and what derive does with them."""
    macro, batch = SIZES[size]
    genotypes = random_genotypes(8)
    madds = mean_madds(genotypes, macro)
    network = CellNetwork(macro, nodes=4, primitives=PRIMITIVES)
    optimizer = sgd(network, 0.9, 3e-4)
    seconds = median_seconds(lambda: train(network, optimizer, genotypes, batch))
    speed = batch * len(genotypes) / seconds
    training = Figure(f"supernet training, {size}", speed, "images/s", 3 * madds * speed / peak)

    images, labels = made_images(256)
    seconds = median_seconds(lambda: [accuracy(network, images, labels, g) for g in genotypes])
    speed = len(labels) * len(genotypes) / seconds
    name = f"derive, one candidate on 10,000 images, {size}"
    return [training, Figure(name, 10_000 / speed, "s", madds * speed / peak)]


def scratch(size: str, peak: float) -> Figure:
    """Measure training of a standalone network."""
    macro, batch = SIZES[size]
    darts = zoo.get("DARTS")
    network = CellNetwork(macro, genotype=darts)
    optimizer = sgd(network, 0.9, 3e-4)
    speed = batch / median_seconds(lambda: train(network, optimizer, [None], batch))
    share = 3 * mean_madds([darts], macro) * speed / peak
    return Figure(f"training DARTS from scratch, {size}", speed, "images/s", share)


def policies() -> list[Figure]:
    """Measure the policy alone: rewards cost nothing here."""
    generator = torch.Generator().manual_seed(0)
    genotypes = random_genotypes(128)
    logits = GCNLogits(len(PRIMITIVES), GCNConfig(), generator)
    policy = Policy(logits, by_name("natpp"))
    optimizer = torch.optim.Adam(logits.parameters(), lr=3e-4)
    cells = 2 * len(genotypes)

    def no_reward(before: Sequence[Genotype], after: Sequence[Genotype]) -> list[float]:
        return [0.0] * len(after)

    forward = median_seconds(lambda: policy.sample(genotypes, generator))
    update = median_seconds(
        lambda: policy_step(policy, optimizer, genotypes, 1, no_reward, None, 3e-3, 0.99, generator)
    )
    return [
        Figure("policy, sampling for 128 genotypes", cells / forward, "cells/s"),
        Figure("policy, update on 128 genotypes", cells / update, "cells/s"),
    ]


def pipeline() -> Figure:
    """Measure augmentation and normalisation in batches of 128."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (128, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mean = std = torch.full((3,), 0.5)
    seconds = median_seconds(lambda: data.normalise(data.augment(images, generator), mean, std))
    return Figure("data pipeline: crop, flip, normalise", len(images) / seconds, "images/s")


def start_up() -> Figure:
    """Measure the import of everything that computes."""
    command = [sys.executable, "-c", "import natlib.search"]
    seconds = median_seconds(lambda: subprocess.run(command, check=True))
    return Figure("start-up: importing natlib.search", seconds, "s")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    peak = matrix_product()
    print(f"{cpu_model()}, {threads} thread(s), torch {torch.__version__}")
    print(f"{'matrix product, 1024 x 1024':<48}{peak / 1e9:>12,.1f} G multiply-adds/s")
    figures = [start_up(), pipeline(), *policies()]
    for size in SIZES:
        figures += [*supernet(size, peak), scratch(size, peak)]
    for figure in figures:
        share = "" if figure.share is None else f"   {figure.share:.0%} of the matrix product"
        print(f"{figure.name:<48}{figure.value:>12,.1f} {figure.unit}{share}")
    content = {
        "cpu": cpu_model(),
        "threads": threads,
        "torch": str(torch.__version__),
        "matrix_product_madds_per_s": peak,
        "figures": [vars(figure) for figure in figures],
    }
    write_text(RUNS / "bench.json", json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
