"""Refuse a genotype that the supernets and policies of a scale lack, before they are trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments import SCALES, exit_with, parameters_at, read_experiments, require

from natlib.genotype import read
from natlib.policy import GCNConfig
from natlib.search import SpaceConfig, require_rewritable, settings

PAGE = "05_transform"


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("genotype", type=Path)
    parser.add_argument("--scale", required=True)
    arguments = parser.parse_args()
    require(arguments.scale, SCALES, "scale")
    given = parameters_at(read_experiments(), PAGE, arguments.scale)
    gcn = settings(GCNConfig, given["policy"].get("gcn", {}))
    require_rewritable(read(arguments.genotype), settings(SpaceConfig, given["space"]), gcn.degree)
    return 0


if __name__ == "__main__":
    exit_with(main)
