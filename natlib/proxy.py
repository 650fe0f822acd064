"""What shared weights say of natbench's architectures, against what their own trainings say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from natlib import natbench
from natlib.macro import MacroConfig
from natlib.natbench_build import DATA, MACRO
from natlib.network import CellNetwork
from natlib.primitives import PRIMITIVES
from natlib.records import Record, Run, RunStore
from natlib.report import RANKED, RankCorrelation, format_interval, interval, rank_correlation
from natlib.search import settings
from natlib.tabular import Codes, Space, Values
from natlib.train import DataConfig, accuracies, device, lacking, splits, stream, train_epochs
from natlib.transitions import by_name

KIND = "proxy"
RECIPE = 1


@dataclass(frozen=True)
class ProxyConfig:
    """A supernet over natbench, of natbench's network and training images.

    One uniformly drawn architecture a step, trained as ``search.SupernetConfig`` describes. Scores
    are accuracies on the first ``images`` report images, which natbench does not use, of ``scored``
    architectures (at most; drawn among those that compute differently).
    """

    seed: int
    epochs: int
    images: int
    scored: int = natbench.SIZE
    batch: int = 64
    lr: float = 0.05
    lr_last: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    data: DataConfig = DATA
    macro: MacroConfig = MACRO


def score(run: Run) -> dict[str, Any]:
    """Train a supernet, score the space with it; body of records of kind "proxy".

    Returns the ``losses`` of the epochs, and the ``accuracy`` (0..1) of each architecture by index,
    None where it is not scored; those that compute the same (``natbench.trained_as``) share one.
    """
    config: ProxyConfig = run.config
    network = CellNetwork(
        config.macro, nodes=2, primitives=PRIMITIVES, generator=stream(config.seed, "weights")
    ).to(device())

    def logits(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = int(torch.randint(natbench.SIZE, (), generator=generator))
        found: torch.Tensor = network(x, natbench.genotype(drawn))
        return found

    losses = train_epochs(run, network, logits, what="the supernet")
    report = splits(config.data).report
    distinct = sorted({natbench.trained_as(i) for i in range(natbench.SIZE)})
    order = torch.randperm(len(distinct), generator=stream(config.seed, "scored")).tolist()
    # In the order of the index neighbours have most in common, and what they share is kept.
    distinct = [distinct[k] for k in sorted(order[: config.scored])]
    found = accuracies(
        network,
        report.normalised[: config.images],
        report.labels[: config.images],
        [natbench.genotype(i) for i in distinct],
    )
    known = dict(zip(distinct, found, strict=True))
    return {
        "losses": losses,
        "accuracy": [known.get(natbench.trained_as(i)) for i in range(natbench.SIZE)],
    }


def scores(
    setting: Mapping[str, Any], seeds: int, workers: int, scale: str
) -> tuple[list[Record], str]:
    """Return the records of the first ``seeds`` seeds, computing what is missing; and their origin.

    ``setting`` maps fields of a ``ProxyConfig``, from experiments.yml. Without natbench's images
    they are the recorded reference of ``scale``, if it holds them.
    """
    configs = [settings(ProxyConfig, {**setting, "seed": seed}) for seed in range(seeds)]
    # The table names the images that it comes from.
    return RunStore.default().run_or_recall(
        KIND, configs, score, recipe=RECIPE, data=str(natbench.load().card["data"]),
        workers=workers, lacking=lacking(DATA), scale=scale,
    )  # fmt: skip


def choices(closures: Sequence[Codes], values: Values) -> Codes:
    """Return for each architecture what a judge of all makes of it: its closure's best by value.

    Of equal ones the first in the order of the codes is taken; NaN is never chosen, and what has
    nothing else in its closure stays as it is.
    """
    chosen = []
    for code, closure in enumerate(closures):
        reached = np.sort(closure)
        known = reached[~np.isnan(values[reached])]
        chosen.append(known[values[known].argmax()] if len(known) else code)
    return np.array(chosen)


@dataclass(frozen=True)
class Judge:
    """How well a score judges a space, for each of its seeds.

    ``correlations`` with test accuracy, over what computes differently; ``gains``: test accuracy
    gained (0..1), over all architectures, by their closures' best by that score.
    """

    correlations: tuple[RankCorrelation, ...]
    gains: tuple[float, ...]


def _correlation(space: Space, values: Values, test: Values) -> RankCorrelation:
    """Rank correlation over what computes differently and has a value."""
    distinct = np.unique(space.computation, return_index=True)[1]
    known = distinct[~np.isnan(values[distinct])]
    return rank_correlation(values[known], test[known])


def judges(records: Sequence[Record], space: Space, rule: str) -> dict[str, Judge]:
    """Compare supernets on natbench with what else one might go by.

    "supernet" has a value for each record; "one training" goes by one seed's validation accuracy
    and is tested on the other's network; "both trainings" is the table, tested on the very networks
    that it chose by; "params" and "MAdds" take the dearest. Tests but those of "one training" are
    the mean of both seeds.
    """
    entries = natbench.load().entries
    validation, test = (
        np.array([getattr(e, name) for e in entries]).T for name in ("validation", "test")
    )
    pairs: dict[str, list[tuple[Values, Values]]] = {
        "supernet": [
            (np.array(r.result["accuracy"], dtype=np.float64), space.test) for r in records
        ],
        "one training": list(zip(validation, test[::-1], strict=True)),
        "both trainings": [(space.validation, space.test)],
        "params": [(space.params, space.test)],
        "MAdds": [(space.madds, space.test)],
    }
    closures = space.closures(space.allowed(by_name(rule, space.primitives)))

    def gain(values: Values, test: Values) -> float:
        return float((test[choices(closures, values)] - test).mean())

    return {
        name: Judge(
            tuple(_correlation(space, *pair) for pair in found),
            tuple(gain(*pair) for pair in found),
        )
        for name, found in pairs.items()
    }


def rows(judged: Mapping[str, Judge]) -> dict[str, dict[str, list[float]]]:
    """Rows for ``evidence.keep`` of judges with seeds: rank correlation and gain, one a seed."""
    return {
        name: {
            RANKED: [c.rho for c in judge.correlations],
            "test gain of its choice, change (points)": list(judge.gains),
        }
        for name, judge in judged.items()
        if len(judge.gains) > 1
    }


def table(judged: Mapping[str, Judge]) -> pd.DataFrame:
    """Tabulate judges, with 95 % intervals over seeds, of one seed over architectures.

    The gain with one seed is exact for this table: it is over all architectures.
    """

    def correlation(found: Sequence[RankCorrelation]) -> str:
        if len(found) < 2:
            (c,) = found
            return f"{c.rho:.2f} [{c.low:.2f}, {c.high:.2f}] ({c.n:,} architectures)"
        i = interval([c.rho for c in found])
        return f"{i.mean:.2f} [{max(-1, i.low):.2f}, {min(1, i.high):.2f}] (n = {i.n} seeds)"

    def gain(found: Sequence[float]) -> str:
        if len(found) < 2:
            return f"{100 * found[0]:+.2f}"
        return format_interval(interval(found), digits=2)

    return pd.DataFrame(
        {
            "judge": list(judged),
            "ρ with test accuracy": [correlation(j.correlations) for j in judged.values()],
            "test gain of its choice (points)": [gain(j.gains) for j in judged.values()],
        }
    )
