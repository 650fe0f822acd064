"""How long a network takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import TypeVar

import torch

from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.macro import Macro
from natlib.network import CellNetwork

Name = TypeVar("Name")


@torch.no_grad()
def latencies(
    networks: Mapping[Name, tuple[Genotype, Macro]], rounds: int, passes: int
) -> dict[Name, float]:
    """Median milliseconds of a forward pass of one image, on one thread, of each network.

    Processor time, so that other processes on the machine disturb little; the rounds go over all
    networks each, so that a slow minute does not meet one of them alone, and a pass that is not
    counted begins each. Raises NatlibError unless there is a round and a pass.
    """
    if rounds < 1 or passes < 1:
        raise NatlibError(f"rounds = {rounds}, passes = {passes}; both must be at least 1")
    times: dict[Name, list[float]] = {name: [] for name in networks}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for name, (genotype, macro) in networks.items():
                network = CellNetwork(macro, genotype=genotype).eval()
                image = torch.zeros(1, macro.image_channels, macro.image_size, macro.image_size)
                image = image.contiguous(memory_format=torch.channels_last)
                network(image)
                for _ in range(passes):
                    started = time.process_time_ns()
                    network(image)
                    times[name].append((time.process_time_ns() - started) / 1e6)
    finally:
        torch.set_num_threads(threads)
    return {name: median(own) for name, own in times.items()}
