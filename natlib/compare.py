"""Whole networks trained from scratch and compared: originals and rewritings, seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from natlib import data, handcrafted, zoo
from natlib.baselines import NAOConfig, closure, nao
from natlib.cost import network_cost
from natlib.drawing import CYCLE, MARKERS, Chart, start_chart
from natlib.errors import NatlibError
from natlib.evidence import DROPPED, LIVE
from natlib.genotype import INPUTS, Genotype
from natlib.macro import BlockMacro, Macro, MacroConfig
from natlib.published import RELEASED, answers, printed_costs
from natlib.records import Record, Run, RunStore
from natlib.report import (
    Interval,
    format_interval,
    holm,
    interval,
    load_reported,
    measured,
    p_value,
    paired_difference,
)
from natlib.search import (
    RECIPES,
    PolicyConfig,
    Scores,
    Setting,
    SupernetConfig,
    derive,
    load_policy,
    load_supernet,
    require_distinct_rules,
    settings,
)
from natlib.train import (
    LEARNED_ENOUGH,
    DataConfig,
    TrainConfig,
    learned_enough,
    splits,
    stream,
    train_standalone,
)
from natlib.transitions import ORIGINAL, TITLES, free

STANDING = {
    True: "The originals learned enough here for a verdict.",
    False: "The originals learned too little here for any verdict: what follows shows that all of "
    "it runs, and how much chance there is in it.",
}
"""What pages say of ``Comparison.learned``."""


@dataclass(frozen=True)
class Network:
    """A network to rewrite: its cells, the macro that is trained and the one that costs count."""

    genotype: Genotype
    trained: Macro
    published: Macro


@dataclass(frozen=True)
class Size:
    """How large networks are trained from scratch, and how long.

    ``images`` are ``DataConfig``'s sizes. Hand-crafted networks keep depth and strides and have
    ``width`` times their channels; all others are ``cells`` DARTS-style cells of ``channels``.
    ``training`` is the rest of a ``TrainConfig``. Mappings come from experiments.yml.
    """

    images: Mapping[str, Any]
    width: float
    channels: int
    cells: int
    training: Mapping[str, Any]

    def data(self, dataset: str) -> DataConfig:
        """The images, with "auto" resolved to a data set that can be had."""
        config: DataConfig = settings(
            DataConfig, {"dataset": data.load(dataset).name, **self.images}
        )
        return config

    def network(self, name: str, images: DataConfig, genotype: Genotype | None = None) -> Network:
        """The hand-crafted or published network ``name``, with its own cells or given ones.

        Raises NatlibError on a name that neither has.
        """
        parts = splits(images)
        shape = parts.classes, images.image_size, parts.channels
        if (name, "CIFAR-10") in handcrafted.MACROS:
            published: Macro = handcrafted.macro(name, "CIFAR-10")
            trained: Macro = handcrafted.scaled(
                handcrafted.macro(name, "CIFAR-10"), self.width, *shape
            )
            return Network(genotype or handcrafted.ORIGINALS[name], trained, published)
        printed = {
            r.architecture: r.network[1]
            for r in printed_costs()
            if r.network and r.dataset == "CIFAR-10"
        }
        return Network(
            genotype or zoo.get(name),
            MacroConfig(self.channels, self.cells, *shape),
            printed.get(name, MacroConfig(channels=36, cells=20)),
        )

    def networks(self, names: Sequence[str], images: DataConfig) -> dict[str, Network]:
        """The networks of these names; see ``network``."""
        return {name: self.network(name, images) for name in names}


# Rewriting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewriteConfig:
    """Rewriting of one network by policies, and by NAO where ``nao`` is given, on one supernet.

    A policy's candidates may cost no more than the input in ``macro``, NAO's may. All look at
    ``samples`` genotypes besides the input, NAO at as many different ones. Results are named after
    rules: raises NatlibError on two policies of one rule.
    """

    supernet: SupernetConfig
    supernet_key: str
    policies: tuple[tuple[PolicyConfig, str], ...]
    name: str
    genotype: Genotype
    macro: Macro
    samples: int
    seed: int
    nao: NAOConfig | None = None

    def __post_init__(self) -> None:
        require_distinct_rules(self.policies)


def rewrite_network(run: Run) -> dict[str, Any]:
    """Rewrite a network's cells; body of records of kind "rewrite".

    Candidates are chosen by accuracy on ``search`` images with shared weights. Returns for each
    method: ``genotype``, ``changed``, ``evaluations``, ``dropped`` (over the budget) and
    ``accuracy`` and ``before_accuracy`` (0..1) on ``report`` images, which chose nothing.
    """
    config: RewriteConfig = run.config
    parts = splits(config.supernet.data)
    network = load_supernet(config.supernet, config.supernet_key)
    score, report = Scores(network, parts.search), Scores(network, parts.report)
    chosen: dict[str, tuple[Genotype, int, int]] = {}
    if config.nao is not None:
        space = closure(config.genotype, free(config.supernet.space.primitives))
        generator = stream(config.seed, "rewrite", config.name, "nao")
        searched = nao(space, score, config.samples + 1, generator, config.nao)
        chosen["NAO"] = searched.genotype, len(searched.trajectory), 0
    for policy_config, key in config.policies:
        rule = policy_config.transitions
        generator = stream(config.seed, "rewrite", config.name, rule)
        policy = load_policy(policy_config, key)
        found = derive(policy, config.genotype, config.samples, score, config.macro, generator)
        title = TITLES[rule]
        chosen[title] = found.genotype, len(found.candidates), found.dropped
    before, *after = report([config.genotype, *(g for g, _, _ in chosen.values())])
    return {
        method: {
            "genotype": genotype.to_json(),
            "changed": genotype != config.genotype,
            "evaluations": evaluations,
            "dropped": dropped,
            "before_accuracy": before,
            "accuracy": value,
        }
        for (method, (genotype, evaluations, dropped)), value in zip(
            chosen.items(), after, strict=True
        )
    }


def rewrite(
    setting: Setting,
    policies: Sequence[tuple[PolicyConfig, Record]],
    networks: Mapping[str, Network],
    samples: int,
    nao: NAOConfig | None = None,
) -> dict[str, list[Record]]:
    """Rewrite each network with each seed's supernet and policies: a record a seed.

    What costs no more is judged at the published size. Raises NatlibError on a cell with primitives
    that the policies do not know.
    """
    pairs = setting.supernets()
    configs = [
        RewriteConfig(
            supernet, record.key,
            tuple((c, r.key) for c, r in policies if c.supernet_key == record.key),
            name, n.genotype, n.published, samples, supernet.seed, nao,
        )
        for name, n in networks.items()
        for supernet, record in pairs
    ]  # fmt: skip
    found = setting.records("rewrite", configs, rewrite_network)
    n = len(pairs)
    return {name: found[i * n : (i + 1) * n] for i, name in enumerate(networks)}


def rewritten(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, list[Genotype]]]:
    """What ``rewrite`` found: method, network, one genotype a seed."""
    methods: dict[str, dict[str, list[Genotype]]] = {}
    for network, group in records.items():
        for method in group[0].result:
            methods.setdefault(method, {})[network] = [
                Genotype.from_json(r.result[method]["genotype"]) for r in group
            ]
    return methods


def promised(records: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], list[float]]:
    """Change of accuracy that ``rewrite`` saw with shared weights, on images that chose nothing.

    Network and method: one fraction a seed.
    """
    return {
        (network, method): [
            float(r.result[method]["accuracy"] - r.result[method]["before_accuracy"]) for r in group
        ]
        for network, group in records.items()
        for method in group[0].result
    }


def before(group: Sequence[Record]) -> list[float]:
    """Accuracy of an input by shared weights, on images that chose nothing: one fraction a seed.

    ``group`` are a network's records by ``rewrite``. Near chance it says that these weights judge
    no rewriting of this network either.
    """
    return [float(next(iter(r.result.values()))["before_accuracy"]) for r in group]


def released(names: Iterable[str], seeds: int) -> dict[str, dict[str, list[Genotype]]]:
    """The authors' released rewritings of published cells: method, network, the same every seed."""
    methods: dict[str, dict[str, list[Genotype]]] = {}
    names = set(names)
    for before, after, rule in zoo.REWRITINGS:
        if before in names:
            group = methods.setdefault(f"{TITLES[rule]}{RELEASED}", {})
            group[before] = [zoo.get(after)] * seeds
    return methods


def transfer_target(source: str) -> str:
    """Another data set than ``source`` that can be had: CIFAR-100 if possible, ``source`` if none.

    A page must say which it is. Raises NatlibError on one that is there but damaged.
    """
    for name in ("cifar100", "cifar10", "fashion_mnist"):
        if name != source:
            try:
                return data.load(name).name
            except data.Absent:
                continue
    return source


# Comparison ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Networks trained from scratch, for each method and network a genotype and a record a seed.

    The method "original" stands first and has every network; a method may lack some. All
    differences are paired: a rewriting and its original were trained with the same seed.
    Accuracies are fractions, test images unless ``part`` is "report".
    """

    networks: Mapping[str, Network]
    seeds: Sequence[int]
    genotypes: Mapping[str, Mapping[str, Sequence[Genotype]]]
    records: Mapping[str, Mapping[str, Sequence[Record]]]
    size: Size
    images: DataConfig

    @property
    def methods(self) -> list[str]:
        """All methods but the original."""
        return [m for m in self.genotypes if m != ORIGINAL]

    @cached_property
    def used(self) -> list[Record]:
        """All records, each once."""
        every = (r for group in self.records.values() for rs in group.values() for r in rs)
        return list({r.key: r for r in every}.values())

    def accuracy(self, method: str, network: str, part: str = "test") -> list[float]:
        """One accuracy a seed."""
        return [float(r.result[f"{part}_accuracy"]) for r in self.records[method][network]]

    def cost(self, method: str, network: str) -> tuple[float, float]:
        """Params and MAdds at the published size, mean over seeds."""
        macro = self.networks[network].published
        costs = [network_cost(g, macro) for g in self.genotypes[method][network]]
        return (
            float(np.mean([c.params for c in costs])),
            float(np.mean([c.madds for c in costs])),
        )

    def difference(
        self, method: str, network: str, against: str = ORIGINAL, part: str = "test"
    ) -> Interval:
        """Accuracy of a method less that of another, paired over seeds."""
        return paired_difference(
            self.accuracy(against, network, part), self.accuracy(method, network, part)
        )

    def mixed(self, method: str, against: str = ORIGINAL, part: str = "test") -> Interval:
        """Mean difference over all networks that both methods have; a seed counts once."""
        shared = [n for n in self.genotypes[method] if n in self.genotypes[against]]
        old, new = (
            np.mean([self.accuracy(m, n, part) for n in shared], axis=0) for m in (against, method)
        )
        return paired_difference(old, new)

    def rewritten(self, method: str, network: str) -> list[bool]:
        """Whether the genotype differs from the original, one a seed."""
        return [g != self.networks[network].genotype for g in self.genotypes[method][network]]

    @property
    def learned(self) -> bool:
        """Whether every original ``learned_enough``."""
        means = [float(np.mean(self.accuracy(ORIGINAL, n))) for n in self.networks]
        return learned_enough(min(means), 1 / splits(self.images).classes)

    def silent(self, method: str, network: str) -> list[bool]:
        """Whether the network answers every image alike, one a seed: its cells let nothing through.

        Shared weights need not notice: theirs is another network, of other cells in a row.
        """
        macro = self.networks[network].trained
        return [_silent(g, macro) for g in self.genotypes[method][network]]

    def told(self) -> dict[str, Any]:
        """What pages say in their prose, by the name that it is glued under.

        Sizes of images and networks, numbers of seeds and trainings; ``mixed_nat`` and the like,
        the mixed change of each method; ``lowest`` and ``highest`` mean accuracy of an original,
        and ``chance``, what guessing would get (%); ``standing``, whether a claim can be judged by
        it (see ``learned``).
        """
        originals = [100 * np.mean(self.accuracy(ORIGINAL, n)) for n in self.networks]
        mixed = {
            f"mixed_{key}": format_interval(self.mixed(method))
            for method, key in (("NAO", "nao"), ("NAT", "nat"), ("NAT++", "natpp"))
            if method in self.genotypes
        }
        return mixed | {
            "seeds": len(self.seeds),
            "train": self.images.train,
            "side": self.images.image_size,
            "dataset": self.images.dataset,
            "epochs": self.size.training["epochs"],
            "width": self.size.width,
            "channels": self.size.channels,
            "cells": self.size.cells,
            "trainings": len(self.used),
            "lowest": float(min(originals)),
            "highest": float(max(originals)),
            "chance": 100 / splits(self.images).classes,
            "standing": STANDING[self.learned],
        }

    def _machines(self) -> str:
        """Which methods were trained on what, where that is not the same for all."""
        used = {
            method: ", ".join(sorted({r.provenance["device"] for g in group.values() for r in g}))
            for method, group in self.records.items()
        }
        if len(set(used.values())) == 1:
            return ""
        return f"; trained on {'; '.join(f'{name} for {m}' for m, name in used.items())}"

    def about(self) -> str:
        """What was trained, in a sentence without its full stop."""
        told = self.told()
        return (
            f"{told['trainings']} trainings on {self.images.train:,} images of "
            f"{self.images.dataset} at {self.images.image_size} pixels, {told['epochs']} epoch(s), "
            f"hand-crafted networks at {self.size.width:g} of their channels, others with "
            f"{self.size.channels} channels and {self.size.cells} cells; accuracy on "
            f"{self.images.test:,} test images{self._machines()}{self.silences()}"
        )

    def silences(self) -> str:
        """Which networks answer every image alike, as the end of a caption; "" if none does."""
        found = [
            f"{network}, {method}, seed {seed}"
            for network, method in self._rows()
            for seed, silent in zip(self.seeds, self.silent(method, network), strict=True)
            if silent
        ]
        return f"; let nothing through and guess: {'; '.join(found)}" if found else ""

    def kept(
        self, found: Mapping[str, Sequence[Record]] | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Rows for ``evidence.keep``: accuracy, its change, those of cost at the published size.

        "live" cost leaves out edges into nodes that nothing reads. With the records that
        ``rewrite`` gave, also what their shared weights said of the input, and promised, and how
        many samples were dropped because they cost more.
        """
        found = found or {}
        told = promised(found)
        rows: dict[str, dict[str, list[float]]] = {}
        for network, method in self._rows():
            new = self.accuracy(method, network)
            row = rows[f"{network}, {method}"] = {"top-1 (%)": new}
            if method == ORIGINAL:
                row[LEARNED_ENOUGH] = [float(self.learned)] * len(new)
                if network in found:
                    row["by shared weights (%)"] = before(found[network])
                continue
            old = self.accuracy(ORIGINAL, network)
            row["change (points)"] = [b - a for a, b in zip(old, new, strict=True)]
            if (network, method) in told:
                row["change by shared weights"] = told[network, method]
                row[DROPPED] = [float(r.result[method]["dropped"]) for r in found[network]]
            macro, start = self.networks[network].published, self.cost(ORIGINAL, network)
            own = network_cost(self.networks[network].genotype.pruned(), macro)
            costs = [network_cost(g, macro) for g in self.genotypes[method][network]]
            row["params change (%)"] = [c.params / start[0] - 1 for c in costs]
            row["MAdds change (%)"] = [c.madds / start[1] - 1 for c in costs]
            live = [
                network_cost(g.pruned(), macro).madds / own.madds - 1
                for g in self.genotypes[method][network]
            ]
            row[LIVE] = live
            row["rewritten"] = [float(changed) for changed in self.rewritten(method, network)]
        for method in self.methods:
            groups = [
                row["change (points)"] for name, row in rows.items() if name.endswith(f", {method}")
            ]
            if len(groups) > 1:
                mean = np.mean(groups, axis=0).tolist()
                rows[f"all networks, {method}"] = {"change (points)": mean}
        return rows

    def _rows(self) -> Iterator[tuple[str, str]]:
        for network in self.networks:
            for method, group in self.genotypes.items():
                if network in group:
                    yield network, method

    def table(self, published: str = "", dataset: str = "CIFAR-10") -> pd.DataFrame:
        """A row a network and method, with the numbers that the papers print where they have any.

        ``published`` names the table in ``paper/reported.csv``; its rows that nothing of ours
        ``answers`` come last, with dashes. Raises NatlibError on a table or data set that is not
        there.
        """
        printed: dict[tuple[str, str], dict[str, float]] = {}
        if published:
            reported = load_reported()
            rows = reported[(reported["table"] == published) & (reported["dataset"] == dataset)]
            if rows.empty:
                known = sorted(set(zip(reported["table"], reported["dataset"], strict=True)))
                raise NatlibError(f"no table {published!r} for {dataset!r}; there are {known}")
            for _, line in rows.iterrows():
                printed[line["architecture"], line["method"]] = {
                    "top-1 (%), paper": line["top1"],
                    "params (M), paper": line["params_m"],
                    "MAdds (M), paper": line["madds_m"],
                }
        found, answered = [], set()
        for network, method in self._rows():
            same = [key for key in printed if answers(network, method, *key)]
            answered.update(same)
            params, madds = self.cost(method, network)
            change = self.difference(method, network)
            accuracy = interval(self.accuracy(method, network))
            half = f"\u00a0±\u00a0{100 * (accuracy.high - accuracy.mean):.1f}"
            found.append(
                {
                    "network": network,
                    "method": method,
                    "top-1 (%), ours": f"{100 * accuracy.mean:.1f}"
                    f"{half if accuracy.n > 1 else ''} (n = {accuracy.n})",
                    "change": None
                    if method == ORIGINAL
                    else format_interval(change, counted=False),
                    "params (M), ours": params / 1e6,
                    "MAdds (M), ours": madds / 1e6,
                    **(printed[same[0]] if same else {}),
                }
            )
        found += [
            {"network": n, "method": m, **row}
            for (n, m), row in printed.items()
            if (n, m) not in answered
        ]
        return pd.DataFrame(found)

    def differences(self, found: Mapping[str, Sequence[Record]] | None = None) -> pd.DataFrame:
        """Every method against the original, network by network, with Holm's correction.

        p-values are those of a paired t test, corrected for all rows of the table; "rewritten" says
        in how many seeds the genotype differs from the original. With the records that
        ``rewrite`` gave there is a column of what their shared weights promised, empty for methods
        that are not ours.
        """
        told = promised(found or {})
        pairs = [(n, m) for n, m in self._rows() if m != ORIGINAL]
        changes = [self.difference(m, n) for n, m in pairs]
        p = [p_value(i) for i in changes]
        rewritten = [self.rewritten(m, n) for n, m in pairs]
        frame = pd.DataFrame(
            {
                "network": [n for n, _ in pairs],
                "method": [m for _, m in pairs],
                "change (points)": [format_interval(i) for i in changes],
                "rewritten": [f"{sum(changed)} of {len(changed)}" for changed in rewritten],
                "p": p,
                "p (Holm)": holm(p),
            }
        )
        if told:
            column = [
                format_interval(interval(told[pair]), counted=False) if pair in told else None
                for pair in pairs
            ]
            frame.insert(3, "by shared weights", column)
            inputs = [
                measured(before(found[n]), signed=False) if found and n in found else None
                for n, _ in pairs
            ]
            frame.insert(2, "original by shared weights (%)", inputs)
        return frame

    def summary(self) -> pd.DataFrame:
        """Every method over all its networks: the mixed change, networks improved, cost changes.

        p-values are corrected for all methods (Holm). Seeds are a sample here, networks are not:
        nothing is said of others.
        """
        found = []
        p = holm([p_value(self.mixed(method)) for method in self.methods])
        for method, corrected in zip(self.methods, p, strict=True):
            names = list(self.genotypes[method])
            better = [n for n in names if self.difference(method, n).mean > 0]
            ratios = np.array(
                [np.divide(self.cost(method, n), self.cost(ORIGINAL, n)) for n in names]
            ).mean(axis=0)
            found.append(
                {
                    "method": method,
                    "change (points)": format_interval(self.mixed(method)),
                    "p (Holm)": corrected,
                    "networks improved": f"{len(better)} of {len(names)}",
                    "params change (%)": round(100 * (float(ratios[0]) - 1)),
                    "MAdds change (%)": round(100 * (float(ratios[1]) - 1)),
                }
            )
        return pd.DataFrame(found)

    def plot(self, title: str = "") -> Chart:
        """Draw accuracy against MAdds at the published size, a line for each network's methods."""
        chart = start_chart(300, "")
        axes = chart.subplots()
        said = []
        order = list(self.genotypes)
        for k, network in enumerate(self.networks):
            for method in (m for m in order if network in self.genotypes[m]):
                i = interval(self.accuracy(method, network))
                x, y = self.cost(method, network)[1] / 1e6, 100 * i.mean
                half = 100 * (i.high - i.mean) if i.n > 1 else 0.0
                # A method that changes nothing lies on the original, which shows around it.
                look = {"ms": 13, "mfc": "none"} if method == ORIGINAL else {"ms": 7}
                axes.errorbar(
                    x, y, half, color=CYCLE[k % 7], marker=MARKERS[order.index(method) % 7],
                    capsize=2, ls="", label=f"{network}, {method}", **look,
                )  # fmt: skip
                said.append(f"{network} {method} {x:.0f} M MAdds, {y:.1f} %")
        axes.set(xlabel="MAdds at published size (M)", ylabel="test accuracy (%)", title=title)
        chart.legend(loc="outside lower center", ncols=2)
        chart.alt = f"{title or 'Accuracy and cost'}: {'; '.join(said)}."
        return chart


def compare(
    networks: Mapping[str, Network],
    methods: Mapping[str, Mapping[str, Sequence[Genotype]]],
    size: Size,
    images: DataConfig,
    seeds: Sequence[int],
    workers: int,
) -> Comparison:
    """Train every network as it is and as each method rewrote it, or return what is recorded.

    ``methods``: method, network, one genotype for each of ``seeds``, trained with that seed. Equal
    trainings, as of a rewriting that changed nothing, share a record. Raises NatlibError on a
    network that is not among ``networks`` and on another number of genotypes than of seeds.
    """
    genotypes: dict[str, dict[str, tuple[Genotype, ...]]] = {
        ORIGINAL: {name: (n.genotype,) * len(seeds) for name, n in networks.items()}
    }
    for method, group in methods.items():
        for name, given in group.items():
            if name not in networks:
                raise NatlibError(f"no network {name!r}; there are {', '.join(networks)}")
            if len(given) != len(seeds):
                raise NatlibError(
                    f"{len(given)} genotypes of {name} by {method} for {len(seeds)} seeds"
                )
        genotypes[method] = {name: tuple(given) for name, given in group.items()}
    configs = {
        (method, name, i): _training(networks[name].trained, genotype, seed, size, images)
        for method, group in genotypes.items()
        for name, given in group.items()
        for i, (genotype, seed) in enumerate(zip(given, seeds, strict=True))
    }
    records = RunStore.default().run_many(
        "train", list(configs.values()), train_standalone, recipe=RECIPES["train"],
        data=splits(images).checksum, workers=workers,
    )  # fmt: skip
    found = dict(zip(configs, records, strict=True))
    ordered = {
        method: {n: [found[method, n, i] for i in range(len(seeds))] for n in group}
        for method, group in genotypes.items()
    }
    return Comparison(networks, tuple(seeds), genotypes, ordered, size, images)


def _silent(genotype: Genotype, macro: Macro) -> bool:
    """Whether nothing of the image reaches the network's output."""
    cells = dict(genotype.cells)
    heard = [True, True]
    for position in macro.positions():
        read = cells[position.kind].live
        heard = [heard[1], any(heard[i] for i in range(INPUTS) if i in read)]
    return not heard[1]


def _training(
    macro: Macro, genotype: Genotype, seed: int, size: Size, images: DataConfig
) -> TrainConfig:
    config: TrainConfig = settings(
        TrainConfig,
        {"data": images, "macro": macro, "genotype": genotype, "seed": seed, **size.training},
    )
    # Hand-crafted networks have no place for an auxiliary head, and some no second path.
    return (
        replace(config, auxiliary=0.0, drop_path=0.0) if isinstance(macro, BlockMacro) else config
    )
