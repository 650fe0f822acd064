"""Thousands of genotypes: every valid one builds, runs and costs what it should, no other one does.

The genotypes are small, so that two thousand take seconds; `test_network` and `test_cost` look
closer at fewer.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natlib import NatlibError
from natlib.cost import network_cost
from natlib.genotype import INPUTS, Genotype, format_darts, parse
from natlib.macro import MacroConfig
from natlib.network import CellNetwork, parameter_count
from natlib.primitives import ALL_PRIMITIVES
from tests.strategies import all_runs, any_genotypes, genotypes, run_counting

MANY = settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
# A normal cell and two reducing ones, so that both strides occur.
MACRO = MacroConfig(channels=4, cells=3, classes=2, image_size=8, stem=1)


@MANY
@given(any_genotypes())
def test_valid_genotypes_build_run_cost_and_survive_writing(genotype: Genotype) -> None:
    network = CellNetwork(MACRO, genotype=genotype).eval()
    image = torch.ones(1, 3, MACRO.image_size, MACRO.image_size)
    with torch.no_grad():
        logits, madds = run_counting(network, image)
    assert logits.shape == (1, 2)
    assert bool(logits.isfinite().all())
    cost = network_cost(genotype, MACRO)
    assert cost.params == parameter_count(network.parameters())
    # Parts that reach no output cost, by the papers' count, and are not run.
    assert madds == cost.madds if all_runs(genotype) else madds <= cost.madds
    assert parse(format_darts(genotype)) == genotype


def drop(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    del fields[draw(st.sampled_from([cell, f"{cell}_concat"]))]


def add(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    fields[draw(st.text().filter(lambda t: t not in fields and t != "source"))] = []


def rename(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    edge = draw(st.sampled_from(fields[cell]))
    edge[0] = draw(st.text().filter(lambda t: t not in ALL_PRIMITIVES))


def turn(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    edge = draw(st.sampled_from(fields[cell]))
    edge[1] = draw(st.integers(max_value=-1) | st.integers(min_value=edge[2]))


def into_an_input(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    draw(st.sampled_from(fields[cell]))[2] = draw(st.integers(max_value=INPUTS - 1))


def deform(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    edges = fields[cell]
    i = draw(st.integers(0, len(edges) - 1))
    name, source, target = edges[i]
    edges[i] = draw(
        st.sampled_from(
            [None, name, [name], [name, source], [name, str(source), target],
             [name, source, target + 0.5], [name, source, target, target], [source, name, target],
             [name, True, target], {"primitive": name}]
        )
    )  # fmt: skip


def starve(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    # The edges into all nodes but a last one far behind.
    last = max(e[2] for e in fields[cell])
    fields[cell].append([fields[cell][0][0], 0, last + draw(st.integers(2, 50))])


def misplace(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    last = max(e[2] for e in fields[cell])
    fields[f"{cell}_concat"].append(
        draw(st.integers(max_value=INPUTS - 1) | st.integers(min_value=last + 1))
    )


def repeat(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    concat = fields[f"{cell}_concat"]
    concat.append(draw(st.sampled_from(concat)))


def empty(fields: dict[str, Any], draw: st.DrawFn, cell: str) -> None:
    fields[draw(st.sampled_from([cell, f"{cell}_concat"]))] = []


FAULTS = (drop, add, rename, turn, into_an_input, deform, starve, misplace, repeat, empty)


@st.composite
def invalid(draw: st.DrawFn) -> dict[str, Any]:
    """A genotype's JSON with one fault."""
    fields = copy.deepcopy(draw(genotypes()).to_json())
    draw(st.sampled_from(FAULTS))(fields, draw, draw(st.sampled_from(["normal", "reduce"])))
    return fields


@MANY
@given(invalid())
def test_invalid_genotypes_raise_our_own_error(fields: dict[str, Any]) -> None:
    with pytest.raises(NatlibError):
        Genotype.from_json(fields)
