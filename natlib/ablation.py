"""Ablations on the supernet: candidates in full, learners side by side, graphs of one function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from natlib.budget import Budget
from natlib.compare import Network
from natlib.cost import network_cost
from natlib.errors import NatlibError
from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import Macro
from natlib.network import CellNetwork
from natlib.operations import BatchNorm
from natlib.policy import Policy
from natlib.records import Record, Run
from natlib.report import Interval, format_interval, holm, p_value
from natlib.search import (
    PolicyConfig,
    Scores,
    Setting,
    SpaceConfig,
    SupernetConfig,
    derive,
    load_policy,
    load_supernet,
    random_policy,
)
from natlib.train import accuracies, splits, stream


def differences(found: Mapping[str, Interval], digits: int = 2) -> pd.DataFrame:
    """Tabulate paired differences of accuracies, p-values corrected for their number (Holm)."""
    p = [p_value(i) for i in found.values()]
    return pd.DataFrame(
        {
            "comparison": list(found),
            "difference (points)": [format_interval(i, digits=digits) for i in found.values()],
            "p": p,
            "p (Holm)": holm(p),
        }
    )


# Batch statistics --------------------------------------------------------------------------------


@contextmanager
def fixed_statistics(
    network: CellNetwork, images: Tensor, genotype: Genotype
) -> Iterator[CellNetwork]:
    """Let a supernet normalise by ``images`` (N, C, H, W), as one genotype sees them, not by batch.

    What evaluation mode would be, had these weights been trained for this genotype alone.
    """
    norms = [m for m in network.modules() if isinstance(m, BatchNorm)]

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        # From here on this layer normalises by them, this very pass included.
        module.mean, module.variance = mean, variance

    training = network.training
    network.eval()
    hooks = [m.register_forward_pre_hook(note) for m in norms]
    try:
        network(images, genotype)
        for hook in hooks:
            hook.remove()
        yield network
    finally:
        for hook in hooks:
            hook.remove()
        for module in norms:
            module.mean = module.variance = None
        network.train(training)


# Candidates --------------------------------------------------------------------------------------

STATISTICS = {
    "search": "batches in a fixed order",
    "shuffled": "training mode, drawn batches",
    "fixed": "statistics of training images",
}
"""Ways to normalise while choosing, by the name of their scores."""


@dataclass(frozen=True)
class CandidatesConfig:
    """What a policy proposes for held-out random architectures, and how every proposal scores.

    A policy of None is that of uniform random transitions of ``transitions``. Scores are taken on
    ``images`` images of each part, other ones for each seed, statistics of ``batch`` drawn images
    and of ``images`` training images only if ``statistics``. Inputs are the first of
    ``search.GainConfig``'s.
    """

    supernet: SupernetConfig
    supernet_key: str
    policy: tuple[PolicyConfig, str] | None
    transitions: str
    genotypes: int
    samples: int
    images: int
    batch: int
    statistics: bool
    seed: int


@torch.no_grad()
def score_candidates(run: Run) -> dict[str, Any]:
    """Score each input and its sampled rewritings; body of records of kind "candidates".

    Returns lists (genotypes, 1 + samples), the input first: ``within`` its cost, and accuracy
    (0..1) on ``report`` and ``test`` images and, to choose by, on ``search`` images, by ``search``,
    ``shuffled`` and ``fixed`` statistics (see ``STATISTICS``).
    """
    config: CandidatesConfig = run.config
    parts, macro = splits(config.supernet.data), config.supernet.macro
    network = load_supernet(config.supernet, config.supernet_key)
    space = SpaceConfig((config.supernet.space.nodes[0],), config.supernet.space.primitives)
    policy = load_policy(*config.policy) if config.policy else random_policy(
        config.transitions, space
    )  # fmt: skip
    generator = stream(config.seed, "held out")
    inputs = [space.sample(generator) for _ in range(config.genotypes)]
    draw = stream(config.seed, "candidates")
    n = config.images
    own = {
        name: getattr(parts, name).share(n, config.seed) for name in ("search", "report", "test")
    }
    x, y = own["search"].normalised, own["search"].labels
    order = torch.randperm(n, generator=stream(config.seed, "shuffled")).to(y.device)
    result: dict[str, Any] = {}
    for done, before in enumerate(inputs):
        row = [before, *policy.sample([before] * config.samples, draw).genotypes]
        limit = Budget.of(network_cost(before, macro))
        distinct = list(dict.fromkeys(row))
        scores: dict[str, list[Any]] = {"within": [limit.allows(g, macro) for g in distinct]}
        for name, part in own.items():
            scores[name] = accuracies(network, part.normalised, part.labels, distinct)
        if config.statistics:
            scores["shuffled"] = accuracies(network, x[order], y[order], distinct, config.batch)
            scores["fixed"] = []
            for g in distinct:
                with fixed_statistics(network, parts.train.normalised[:n], g):
                    scores["fixed"] += accuracies(network, x, y, [g])
        for name, values in scores.items():
            found = dict(zip(distinct, values, strict=True))
            result.setdefault(name, []).append([found[g] for g in row])
        run.progress(done + 1, len(inputs))
    return result


def candidates(
    setting: Setting,
    policies: Sequence[tuple[PolicyConfig, Record]] | None,
    transitions: str,
    given: Mapping[str, Any],
    statistics: bool = False,
) -> list[Record]:
    """Score the candidates of one policy a supernet, or of random transitions: a record a seed.

    ``given`` holds ``genotypes``, ``samples``, ``images`` and ``batch`` of a ``CandidatesConfig``.
    """
    keys = {c.supernet_key: (c, r.key) for c, r in policies or () if c.transitions == transitions}
    configs = [
        CandidatesConfig(
            supernet, record.key, keys[record.key] if policies else None, transitions,
            statistics=statistics, seed=supernet.seed, **given,
        )
        for supernet, record in setting.supernets()
    ]  # fmt: skip
    return setting.records("candidates", configs, score_candidates)


def picked(record: Record, by: str, samples: int) -> NDArray[np.int64]:
    """Return which of the first ``samples`` candidates each input would choose by a score (H,)."""
    scores = np.where(record.result["within"], record.result[by], -1.0)[:, : samples + 1]
    return np.asarray(scores.argmax(1))


def gained(record: Record, by: str, samples: int, on: str = "report") -> float:
    """Return the mean accuracy gained over the input ``on`` images when choosing ``by`` a score."""
    values = np.array(record.result[on])
    pick = picked(record, by, samples)
    return float((values[np.arange(len(pick)), pick] - values[:, 0]).mean())


# Learners ----------------------------------------------------------------------------------------

LEARNERS = ("Random Search", "LSTM", "Maximum-GCN", "Sampling-GCN")
"""The rows of NAT's Table 3, as the paper names them."""


@dataclass(frozen=True)
class LearnersConfig:
    """One network to be rewritten by each of ``LEARNERS`` under one rule, on one supernet."""

    supernet: SupernetConfig
    supernet_key: str
    gcn: tuple[PolicyConfig, str]
    lstm: tuple[PolicyConfig, str]
    name: str
    genotype: Genotype
    macro: Macro
    samples: int
    seed: int


def rewrite_by_learners(run: Run) -> dict[str, Any]:
    """Rewrite a network's cells by each learner; body of records of kind "rewrite".

    The best of ``samples`` on ``search`` images, the input included; "Maximum-GCN" looks at the
    most likely rewriting alone and takes it unless it costs more. Returns for each learner
    ``genotype`` and ``changed``.
    """
    config: LearnersConfig = run.config
    parts = splits(config.supernet.data)
    network = load_supernet(config.supernet, config.supernet_key)
    gcn, before = load_policy(*config.gcn), config.genotype
    rule = config.gcn[0].transitions
    policies: dict[str, Policy] = {
        "Random Search": random_policy(rule, config.supernet.space),
        "LSTM": load_policy(*config.lstm),
        "Sampling-GCN": gcn,
    }
    score = Scores(network, parts.search)
    (likely,) = gcn.most_likely([before])
    limit = Budget.of(network_cost(before, config.macro))
    chosen = {"Maximum-GCN": likely if limit.allows(likely, config.macro) else before}
    for name, policy in policies.items():
        generator = stream(config.seed, "learners", config.name, name)
        found = derive(policy, before, config.samples, score, config.macro, generator)
        chosen[name] = found.genotype
        run.progress(len(chosen), len(LEARNERS))
    return {
        name: {"genotype": chosen[name].to_json(), "changed": chosen[name] != before}
        for name in LEARNERS
    }


def by_learners(
    setting: Setting,
    gcn: Sequence[tuple[PolicyConfig, Record]],
    lstm: Sequence[tuple[PolicyConfig, Record]],
    networks: Mapping[str, Network],
    samples: int,
) -> dict[str, list[Record]]:
    """Rewrite each network by each learner: a record a seed, as ``compare.rewritten`` reads them.

    Both lists hold one policy a supernet, of the same rule.
    """
    pairs = setting.supernets()
    configs = [
        LearnersConfig(
            supernet, record.key, (g, a.key), (m, b.key), name, n.genotype, n.published, samples,
            supernet.seed,
        )
        for name, n in networks.items()
        for (supernet, record), (g, a), (m, b) in zip(pairs, gcn, lstm, strict=True)
    ]  # fmt: skip
    found = setting.records("rewrite", configs, rewrite_by_learners)
    return {name: found[i * len(pairs) :][: len(pairs)] for i, name in enumerate(networks)}


# Graphs ------------------------------------------------------------------------------------------


def representations(genotype: Genotype) -> dict[str, Genotype]:
    """Return three graphs of the same function, which differ in where padding null edges start.

    "published": as given. "nearest": from the closest earlier node that the padded node does not
    read yet (from its own neighbour where it reads all). "slots": as published, but null comes
    after the node's other edge. A null edge computes nothing, so network and cost are the same; but
    policies see another graph, and null to skip makes another network. Raises NatlibError on a
    genotype without null edges.
    """
    if not any(e.primitive == "null" for _, cell in genotype.cells for e in cell.edges):
        raise NatlibError("a genotype without null edges has one graph: there is nothing to vary")

    def nearest(cell: Cell) -> Cell:
        edges = []
        for group in cell.in_edges:
            read = {e.source for e in group if e.primitive != "null"}
            for e in group:
                free = [s for s in range(e.target) if s not in read] or [e.target - 1]
                edges.append(replace(e, source=max(free)) if e.primitive == "null" else e)
        return replace(cell, edges=tuple(edges))

    def swapped(cell: Cell) -> Cell:
        groups: list[list[Edge]] = [
            sorted(group, key=lambda e: e.primitive == "null") for group in cell.in_edges
        ]
        return replace(cell, edges=tuple(e for group in groups for e in group))

    return {
        "published": genotype,
        "nearest": Genotype(nearest(genotype.normal), nearest(genotype.reduce)),
        "slots": Genotype(swapped(genotype.normal), swapped(genotype.reduce)),
    }
