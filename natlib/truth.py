"""Policies trained and judged where every architecture's accuracy is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from natlib import tabular
from natlib.baselines import NAO, NAOConfig, closure, hill_climbing
from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Genotype
from natlib.policy import (
    CellBatch,
    GCNConfig,
    Logits,
    LSTMConfig,
    UniformLogits,
    bm_log_softmax,
    build_logits,
    draw,
    entropy_terms,
)
from natlib.records import Body, Record, Run, RunStore
from natlib.search import BASELINES, advantages, settings
from natlib.tabular import KINDS, Codes, Space, Values, attribute, kind_of
from natlib.train import stream
from natlib.transitions import TITLES, by_name

MASKINGS = ("BMSoftmax", "rejection", "after sampling")
DECAY = 0.99
"""Of the moving baseline, as published."""


class TablePolicy:
    """A policy network with a transition rule over a ``Space``: rewrites codes, one cell each.

    ``masking`` says how forbidden transitions are kept out. "BMSoftmax": they have probability 0.
    "rejection": the softmax covers all primitives and forbidden draws are thrown away, so what is
    drawn follows the same distribution but gradients do not know of the mask. "after sampling": a
    forbidden draw leaves the edge as it was. Raises NatlibError on another masking.
    """

    def __init__(
        self, network: Logits, space: Space, transitions: str, masking: str = "BMSoftmax"
    ) -> None:
        if masking not in MASKINGS:
            raise NatlibError(f"masking {masking!r} is not one of {', '.join(MASKINGS)}")
        self.network, self.space, self.masking = network, space, masking
        self.mask = torch.from_numpy(space.allowed(by_name(transitions, space.primitives)))
        whole = torch.ones_like(self.mask)
        # What is drawn from, and what gradients go through.
        self.drawable = whole if masking == "after sampling" else self.mask
        self.known = self.mask if masking == "BMSoftmax" else whole
        self.powers = torch.from_numpy(space.powers.copy())
        self.edges = torch.arange(len(space.edges))
        targets = [target - INPUTS for _, target in space.edges]
        slots = [targets[:i].count(t) for i, t in enumerate(targets)]
        self.nodes, self.slots = torch.tensor(targets), torch.tensor(slots)
        shape = (max(targets) + 1, max(slots) + 1)
        self.sources = torch.zeros(shape, dtype=torch.long)
        self.sources[self.nodes, self.slots] = torch.tensor([s for s, _ in space.edges])
        self.present = torch.zeros(shape, dtype=torch.bool)
        self.present[self.nodes, self.slots] = True

    def encode(self, digits: Tensor) -> CellBatch:
        """Encode primitive indexes (B, E) as B normal cells."""
        cells = torch.zeros(len(digits), *self.sources.shape, dtype=torch.long)
        cells[:, self.nodes, self.slots] = digits
        return CellBatch(
            cells,
            self.sources.expand_as(cells),
            self.present.expand_as(cells),
            torch.zeros(len(digits), dtype=torch.bool),
        )

    def logits(self, digits: Tensor) -> Tensor:
        """Return logits (B, E, K) of primitive indexes (B, E)."""
        return self.network(self.encode(digits))[:, self.nodes, self.slots]

    @torch.no_grad()
    def draw(self, inputs: Codes, times: int, generator: torch.Generator) -> Codes:
        """Sample rewritings of each code: (len(inputs), times)."""
        digits = torch.from_numpy(self.space.digits(inputs))
        logp = bm_log_softmax(self.logits(digits), self.drawable[self.edges, digits])
        actions = draw(logp, torch.rand(*digits.shape, times, generator=generator))
        return np.asarray(rewritten(self.mask, self.powers, digits, actions))

    @torch.no_grad()
    def most_likely(self, inputs: Codes) -> Codes:
        """Return the argmax rewriting of each code (the paper's Maximum-GCN)."""
        digits = torch.from_numpy(self.space.digits(inputs))
        logp = bm_log_softmax(self.logits(digits), self.drawable[self.edges, digits])
        actions = logp.argmax(-1, keepdim=True)
        return np.asarray(rewritten(self.mask, self.powers, digits, actions)[:, 0])

    @torch.no_grad()
    def accepted(self, inputs: Codes) -> float:
        """Return how likely a draw from the softmax over all primitives is an allowed rewriting."""
        digits = torch.from_numpy(self.space.digits(inputs))
        allowed = self.logits(digits).softmax(-1) * self.mask[self.edges, digits]
        return float(allowed.sum(-1).prod(-1).mean())


def rewritten(mask: Tensor, powers: Tensor, digits: Tensor, actions: Tensor) -> Tensor:
    """Codes (..., B, R) of actions (..., B, E, R) on digits (B, E); forbidden ones are left out.

    ``mask`` (..., E, K, K) says which targets each source may have on each edge.
    """
    edges = torch.arange(digits.shape[1])
    legal = mask[..., edges, digits, :].gather(-1, actions)
    after = torch.where(legal, actions, digits[..., None])
    return (after * powers[:, None]).sum(-2)


# Training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """A policy and how REINFORCE trains it on a table's validation accuracies.

    The reward is the validation accuracy gained, at most 0 where the rewriting costs more.

    ``network`` is a policy network (a graph convolution is built for the space's in-degree), or
    None for uniform random transitions, which need no training. Each of ``updates`` draws
    ``architectures`` inputs that are not held out, and
    ``rollouts`` rewritings of each. The entropy weight falls linearly from ``entropy_weight`` to
    ``entropy_last`` (None: it stays), the learning rate from ``lr`` to ``lr_last``.
    """

    transitions: str = "natpp"
    network: GCNConfig | LSTMConfig | None = field(default_factory=GCNConfig)
    masking: str = "BMSoftmax"
    updates: int = 300
    architectures: int = 32
    rollouts: int = 16
    lr: float = 1e-3
    lr_last: float | None = None
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 5e-4
    entropy_weight: float = 0.003
    entropy_last: float | None = None
    baseline: str = "rollouts"

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise NatlibError(f"baseline {self.baseline!r} is not one of {', '.join(BASELINES)}")


def untrained(learner: Learner, space: Space, seed: int) -> TablePolicy:
    """Build a learner's policy, freshly initialised."""
    k = len(space.primitives)
    network: Logits = UniformLogits(k)
    if (config := learner.network) is not None:
        if isinstance(config, GCNConfig):
            targets = [target for _, target in space.edges]
            config = replace(config, degree=max(targets.count(target) for target in targets))
        network = build_logits(k, config, stream(seed, "policy", learner.transitions))
    return TablePolicy(network, space, learner.transitions, learner.masking)


def train(
    learners: Sequence[Learner], space: Space, training: Codes, seed: int
) -> list[tuple[TablePolicy, float]]:
    """Train policies on inputs from ``training``; return each, and the share of codes looked at.

    Learners of one network and schedule are trained side by side, which takes less time: they meet
    the same inputs and the same random numbers as they would one by one.
    """
    found: dict[int, tuple[TablePolicy, float]] = {}
    for group in alike(learners):
        trained = _train_alike([learners[i] for i in group], space, training, seed)
        found.update(zip(group, trained, strict=True))
    return [found[i] for i in range(len(learners))]


def alike(learners: Sequence[Learner]) -> list[list[int]]:
    """Return the indexes of learners that ``train`` trains side by side, group by group."""
    groups: dict[Learner, list[int]] = {}
    for i, one in enumerate(learners):
        shared = replace(
            one, transitions="", masking="", entropy_weight=0.0, entropy_last=None,
            baseline="moving",
        )  # fmt: skip
        groups.setdefault(shared, []).append(i)
    return list(groups.values())


def earned(space: Space, before: Codes, after: Codes) -> Values:
    """Return rewards: the validation accuracy gained, at most 0 by what costs more.

    That is dropped in the end: it must not earn anything.
    """
    gained = space.validation[after] - space.validation[before]
    return np.where(space.cheaper(after, before), gained, np.minimum(gained, 0))


def _train_alike(
    learners: Sequence[Learner], space: Space, training: Codes, seed: int
) -> list[tuple[TablePolicy, float]]:
    policies = [untrained(one, space, seed) for one in learners]
    first, policy = learners[0], policies[0]
    if first.network is None or not first.updates:
        return [(p, 0.0) for p in policies]
    weights, logits = _side_by_side([p.network for p in policies])
    optimizer = torch.optim.Adam(
        weights.values(), lr=first.lr, betas=first.betas, weight_decay=first.weight_decay,
        fused=True,
    )  # fmt: skip
    drawable, known, allowed = (
        torch.stack([getattr(p, name) for p in policies]) for name in ("drawable", "known", "mask")
    )
    everyone = np.arange(len(policies))[:, None, None]
    seen = np.zeros((len(policies), space.size), dtype=bool)
    baselines: list[float | None] = [None] * len(policies)
    for update in range(first.updates):
        done = update / first.updates
        generator = stream(seed, "update", update)
        chosen = torch.randint(len(training), (first.architectures,), generator=generator)
        inputs = training[chosen.numpy()]
        digits = torch.from_numpy(space.digits(inputs))
        uniform = torch.rand(*digits.shape, first.rollouts, generator=generator)
        scores = logits(policy.encode(digits))[:, :, policy.nodes, policy.slots]
        logp = bm_log_softmax(scores, known[:, policy.edges, digits])
        source = bm_log_softmax(scores.detach(), drawable[:, policy.edges, digits])
        actions = draw(source, uniform)
        after = rewritten(allowed, policy.powers, digits, actions).numpy()
        seen[:, inputs] = True
        seen[everyone, after] = True
        rewards = torch.from_numpy(earned(space, inputs[:, None], after)).float().flatten(1)
        compared = []
        for i, one in enumerate(learners):
            advantage, baselines[i] = advantages(
                rewards[i], first.rollouts, one.baseline, baselines[i], DECAY
            )
            compared.append(advantage)
        taken = logp.gather(-1, actions).sum(2).flatten(1)
        entropy = entropy_terms(logp).sum((2, 3)).mean(1)
        weight = torch.tensor(
            [_between(one.entropy_weight, one.entropy_last, done) for one in learners]
        )
        gain = (torch.stack(compared) * taken).mean(1)
        for options in optimizer.param_groups:
            options["lr"] = _between(first.lr, first.lr_last, done)
        optimizer.zero_grad(set_to_none=True)
        (-gain - weight * entropy).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for i, trained in enumerate(policies):
        assert isinstance(trained.network, nn.Module)
        trained.network.load_state_dict({name: w.detach()[i] for name, w in weights.items()})
    return [(p, _mean(looked_at)) for p, looked_at in zip(policies, seen, strict=True)]


def _side_by_side(
    networks: Sequence[Logits],
) -> tuple[dict[str, Tensor], Callable[[CellBatch], Tensor]]:
    """Return the stacked weights (M, ...) of networks of one kind, and their logits (M, ...)."""
    modules = [n for n in networks if isinstance(n, nn.Module)]
    named = [dict(m.named_parameters()) for m in modules]
    weights = {
        name: torch.stack([own[name].detach() for own in named]).requires_grad_()
        for name in named[0]
    }
    if len(modules) == 1:
        return weights, lambda batch: functional_call(
            modules[0], {name: w[0] for name, w in weights.items()}, (batch,)
        )[None]
    return weights, lambda batch: vmap(lambda w: functional_call(modules[0], w, (batch,)))(weights)


def _between(first: float, last: float | None, share: float) -> float:
    return first if last is None else first + (last - first) * share


# Searches ----------------------------------------------------------------------------------------

SEARCHES = ("random search", "hill climbing", "NAO")
SEARCHED = "natpp"
NAO_SIZES = NAOConfig(
    embedding=32, hidden=64, updates=300, steps=tuple(0.25 * 1.25**i for i in range(16))
)


def searched(
    name: str, space: Space, inputs: Codes, training: Codes, times: int, seed: int
) -> Codes:
    """Return what a search evaluates for each input, in order: (len(inputs), times).

    "random search" draws from all architectures that cost no more than the input, "hill climbing"
    goes through its closure under NAT++, and where that is exhausted the input stands again.
    "NAO" fits encoder, predictor and decoder to all of ``training`` once, then moves each input by
    gradient steps of several sizes; where these give no more, the input stands again.
    """
    generator = stream(seed, name)
    if name == "NAO":
        return _nao(space, inputs, training, times, generator)
    everything = np.arange(space.size)
    rows = []
    for code in inputs.tolist():
        if name == "random search":
            within = everything[space.cheaper(everything, np.asarray(code))]
            drawn = torch.randint(len(within), (times,), generator=generator).numpy()
            rows.append(within[drawn].tolist())
        else:
            visited = _climbed(space, code, times, generator)
            rows.append(visited + [code] * (times - len(visited)))
    return np.array(rows)


def _climbed(space: Space, code: int, times: int, generator: torch.Generator) -> list[int]:
    """Codes that hill climbing evaluates beside its start, in order."""

    def evaluate(genotypes: Sequence[Genotype]) -> list[float]:
        return [float(space.validation[space.code(g)]) for g in genotypes]

    def within(genotype: Genotype) -> bool:
        return bool(space.cheaper(np.asarray(space.code(genotype)), np.asarray(code)))

    rule = by_name(SEARCHED, space.primitives)
    around = closure(space.genotype(code), rule, tied=True, within=within)
    found = hill_climbing(around, evaluate, times + 1, generator)
    return [space.code(genotype) for genotype, _ in found.trajectory[1:]]


def _nao(
    space: Space, inputs: Codes, training: Codes, times: int, generator: torch.Generator
) -> Codes:
    """Distinct rewritings of each input by NAO, those of highest predicted accuracy first."""
    model = NAO(len(space.primitives), NAO_SIZES, generator)
    values = torch.from_numpy(space.validation[training]).float()
    model.fit(torch.from_numpy(space.digits(training)), values, generator)
    tokens = torch.from_numpy(space.digits(inputs))
    anything = torch.ones(len(space.edges), len(space.primitives), dtype=torch.bool)
    found = torch.stack([model.improve(tokens, anything, size) for size in NAO_SIZES.steps], 1)
    with torch.no_grad():
        predicted = model.predict(model.encode(found.flatten(0, 1))).view(found.shape[:2])
    order = predicted.argsort(1, descending=True)[..., None].expand_as(found)
    rows = []
    for code, row in zip(inputs.tolist(), space.codes(found.gather(1, order).numpy()), strict=True):
        proposed = [c for c in dict.fromkeys(row.tolist()) if c != code][:times]
        rows.append(proposed + [code] * (times - len(proposed)))
    return np.array(rows)


# Judging -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TruthConfig:
    """One seed of a study: methods trained and judged on one space, on the same held-out inputs.

    ``space`` as in ``tabular.load``, ``searches`` some of ``SEARCHES``. Results are given for each
    number of candidates in ``samples``, single figures for ``chosen`` of them. Of the method
    ``pictured`` some architectures are kept. Raises NatlibError if ``chosen`` is not among
    ``samples``.
    """

    space: str
    seed: int
    methods: tuple[tuple[str, Learner], ...]
    searches: tuple[str, ...]
    held_out: int
    samples: tuple[int, ...]
    chosen: int
    pictured: str = "NAT++"

    def __post_init__(self) -> None:
        if self.chosen not in self.samples:
            raise NatlibError(f"chosen = {self.chosen} is not among samples {self.samples}")


def choose(space: Space, inputs: Codes, candidates: Codes, by: Values) -> Codes:
    """Return the best by ``by`` of each input and its candidates (H, n) that cost no more."""
    everything = np.concatenate([inputs[:, None], candidates], 1)
    within = space.cheaper(everything, inputs[:, None])
    best = np.where(within, by[everything], -np.inf).argmax(1)
    return np.asarray(everything[np.arange(len(inputs)), best])


@dataclass(frozen=True)
class Optimum:
    """What is the most that each input could become at no more cost: accuracies (H,).

    ``validation`` and ``test`` within its closure under a rule, ``space_validation`` and
    ``space_test`` among all architectures.
    """

    validation: Values
    test: Values
    space_validation: Values
    space_test: Values


def optimum(space: Space, rule: str, inputs: Codes) -> Optimum:
    """Find the best of each input's closure and of the whole space, by looking at all."""
    allowed = space.allowed(by_name(rule, space.primitives))
    everything = np.arange(space.size)
    rows = []
    for code in inputs:
        reached = space.closure(allowed, int(code))
        within = everything[space.cheaper(everything, code)]
        rows.append([
            values[codes].max() for codes in (reached, within)
            for values in (space.validation, space.test)
        ])  # fmt: skip
    return Optimum(*np.array(rows).T)


def judge(
    config: TruthConfig, space: Space, inputs: Codes, best: Optimum, drawn: Codes
) -> dict[str, Any]:
    """Say how good the candidates (H, n) of a method are, the first ones counted first.

    Accuracies and their differences in 0..1, means over the inputs. Lists go over
    ``config.samples``: ``gains`` (validation, which chose) and ``test_gains`` of the chosen
    candidate over the input. Of ``config.chosen`` candidates: these as ``gain`` and ``test_gain``;
    ``share`` of what is ``attainable`` in the closure; ``regret`` and ``test_regret`` to the
    closure's best, ``space_regret`` and ``space_test_regret`` to the best of all at no more cost,
    ``whole_regret`` to the best of all;
    ``worse``, how often the chosen one's test accuracy is below its input's; ``inflation``, what
    choosing on test data adds to test accuracy; ``madds`` and ``params``, their relative change;
    ``kinds``, what each kind of transition adds to ``test_gain``. Of the first candidate as it is:
    ``single_gain``, ``single_test_gain``, ``single_worse``, and ``dearer``, how often it costs
    more.
    """
    before, before_test = space.validation[inputs], space.test[inputs]
    picks = {n: choose(space, inputs, drawn[:, :n], space.validation) for n in config.samples}
    after = picks[config.chosen]
    first = drawn[:, 0]
    on_test = choose(space, inputs, drawn[:, : config.chosen], space.test)
    attainable = _mean(best.validation - before)
    return {
        "gains": [_mean(space.validation[p] - before) for p in picks.values()],
        "test_gains": [_mean(space.test[p] - before_test) for p in picks.values()],
        "gain": _mean(space.validation[after] - before),
        "test_gain": _mean(space.test[after] - before_test),
        "attainable": attainable,
        "share": round(_mean(space.validation[after] - before) / attainable, 6),
        "regret": _mean(best.validation - space.validation[after]),
        "test_regret": _mean(best.test - space.test[after]),
        "space_regret": _mean(best.space_validation - space.validation[after]),
        "space_test_regret": _mean(best.space_test - space.test[after]),
        "whole_regret": _mean(space.validation.max() - space.validation[after]),
        "worse": _mean(space.test[after] < before_test),
        "inflation": _mean(space.test[on_test] - space.test[after]),
        "madds": _mean(space.madds[after] / space.madds[inputs] - 1),
        "params": _mean(space.params[after] / space.params[inputs] - 1),
        "single_gain": _mean(space.validation[first] - before),
        "single_test_gain": _mean(space.test[first] - before_test),
        "single_worse": _mean(space.test[first] < before_test),
        "dearer": _mean(~space.cheaper(first, inputs)),
        "kinds": by_kind(space, inputs, after),
    }


def _mean(values: NDArray[Any]) -> float:
    return round(float(values.mean()), 6)


def plane(config: TruthConfig, space: Space, inputs: Codes, drawn: Codes) -> list[list[float]]:
    """Return MAdds and test accuracy before and after, of the first 20 inputs."""
    after = choose(space, inputs, drawn[:, : config.chosen], space.validation)
    columns = [values[codes] for codes in (inputs, after) for values in (space.madds, space.test)]
    return [[round(float(x), 4) for x in row] for row in np.stack(columns, 1)[:20]]


def by_kind(space: Space, before: Codes, after: Codes) -> dict[str, float]:
    """Return what each kind of transition adds to the mean change of test accuracy."""
    shares = attribute(space, before, after, space.test)
    names = space.primitives
    kinds = np.array([[kind_of(s, t) for t in names] for s in names])
    found = kinds[space.digits(before), space.digits(after)]
    return {kind: round(float(shares[found == kind].sum()) / len(before), 6) for kind in KINDS}


def study(run: Run) -> dict[str, Any]:
    """Train and judge all methods of a ``TruthConfig``; body of records of kind "truth".

    Returns, if there are ``methods``, accuracies of the "input"; and for each method what ``judge``
    says of its samples; of policies also ``looked_at``, the share of the space whose accuracy
    training used; of trained ones also the same of their most likely rewriting (``argmax_gain``,
    ...; the input where it costs more) and ``accepted``, how likely a draw from the softmax over
    all primitives is allowed; of the one that is pictured, its ``plane``.
    """
    config: TruthConfig = run.config
    space = tabular.load(config.space)
    inputs, training = space.split(config.held_out, stream(config.seed, "held out"))
    result: dict[str, Any] = run.load_checkpoint() or {}
    if config.methods:
        result["input"] = {"gain": 0.0, "test_gain": 0.0} | {
            name: _mean(getattr(space, name)[inputs]) for name in ("validation", "test")
        }
    total = len(config.methods) + len(config.searches)
    done = 0

    @cache
    def best(rule: str) -> Optimum:
        return optimum(space, rule, inputs)

    for group in alike([learner for _, learner in config.methods]):
        methods = [config.methods[i] for i in group]
        if not all(name in result for name, _ in methods):
            trained = train([learner for _, learner in methods], space, training, config.seed)
            for (name, learner), (policy, looked_at) in zip(methods, trained, strict=True):
                result[name] = _judged(
                    config, space, inputs, best(learner.transitions), name, learner, policy
                )
                result[name]["looked_at"] = looked_at
        done += len(group)
        run.progress(done, total)
        if run.checkpoint_due():
            run.save_checkpoint(result)
    for name in config.searches:
        if name not in result:
            drawn = searched(name, space, inputs, training, max(config.samples), config.seed)
            result[name] = judge(config, space, inputs, best(SEARCHED), drawn)
        done += 1
        run.progress(done, total)
    return result


def _judged(
    config: TruthConfig, space: Space, inputs: Codes, best: Optimum, name: str, learner: Learner,
    policy: TablePolicy,
) -> dict[str, Any]:  # fmt: skip
    """What ``study`` says of one policy."""
    candidates = policy.draw(inputs, max(config.samples), stream(config.seed, "draw", name))
    found = judge(config, space, inputs, best, candidates)
    if name == config.pictured:
        found["plane"] = plane(config, space, inputs, candidates)
    if learner.network is not None:
        likely = policy.most_likely(inputs)
        likely = np.where(space.cheaper(likely, inputs), likely, inputs)
        found |= {
            "argmax_gain": _mean(space.validation[likely] - space.validation[inputs]),
            "argmax_test_gain": _mean(space.test[likely] - space.test[inputs]),
            "argmax_worse": _mean(space.test[likely] < space.test[inputs]),
            "accepted": round(policy.accepted(inputs), 6),
        }
    return found


# Studies -----------------------------------------------------------------------------------------

RECIPE = 2


@dataclass(frozen=True)
class Study:
    """Records of kind "truth", for each seed one of policies and one of searches; and their origin.

    ``records`` are empty where the table is missing or incomplete and nothing is recorded.
    """

    records: list[Record]
    source: str

    def values(self, method: str, metric: str) -> list[Any]:
        """Return a method's metric (see ``judge``, ``study``), one value a seed; [] without."""
        results = [r.result[method] for r in self.records if method in r.result]
        return [result[metric] for result in results if metric in result]

    def kinds(self, method: str) -> dict[str, list[float]]:
        """Return what each kind of transition adds to test accuracy, one value a seed."""
        found = self.values(method, "kinds")
        return {kind: [one[kind] for one in found] for kind in KINDS}


@dataclass(frozen=True)
class Setting:
    """What a chapter and the scorecard share: a space, seeds, and variations of one learner.

    Each seed works in ``tabular.in_turn`` of the space.
    ``learner`` maps fields of ``Learner``, ``gcn`` and ``lstm`` those of its networks; mappings
    come from experiments.yml. See ``methods`` for what is varied, ``TruthConfig`` for the rest.
    """

    space: str
    seeds: int
    held_out: int
    rules: tuple[str, ...]
    learner: Mapping[str, Any]
    gcn: Mapping[str, Any]
    lstm: Mapping[str, Any]
    entropy_weights: tuple[float, ...] = ()
    updates: tuple[int, ...] = ()
    graphs: tuple[str, ...] = ("released",)
    samples: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    chosen: int = 10

    def methods(self, varied: bool = True) -> dict[str, Learner]:
        """Return the learners by name.

        Each of ``rules`` is learned, and uniformly random ("NAT++ random"). If ``varied``, there
        are also, with NAT++: other ``graphs`` of the GCN, an LSTM, other masking, a moving
        baseline, the published settings (with the most of ``updates``, of our size), constant
        weights λ of the entropy, and other numbers of ``updates``.
        """
        gcn = settings(GCNConfig, self.gcn)
        learner = settings(Learner, {**self.learner, "network": gcn})
        found = {TITLES[rule]: replace(learner, transitions=rule) for rule in self.rules}
        found |= {f"{name} random": replace(one, network=None) for name, one in found.items()}
        if not varied:
            return found
        for graph in self.graphs:
            found[f"{graph} GCN"] = replace(learner, network=replace(gcn, graph=graph))
        found["LSTM"] = replace(learner, network=settings(LSTMConfig, self.lstm))
        found |= {name: replace(learner, masking=name) for name in MASKINGS[1:]}
        found["moving baseline"] = replace(learner, baseline="moving")
        found["published settings"] = Learner(
            updates=max((learner.updates, *self.updates)),
            architectures=learner.architectures,
            rollouts=learner.rollouts,
            network=gcn,
            lr=3e-4,
            baseline="moving",
        )
        for weight in self.entropy_weights:
            found[f"λ = {weight:g}"] = replace(learner, entropy_weight=weight, entropy_last=None)
        found |= {f"{number} updates": replace(learner, updates=number) for number in self.updates}
        return found

    def variants(self, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Learner]:
        """Return NAT++ learners that differ from ours in the given fields; ``graph`` is the GCN's.

        Raises NatlibError on a field that a learner does not have.
        """
        found = {}
        for name, changes in given.items():
            gcn = settings(
                GCNConfig, {**self.gcn, **{k: changes[k] for k in changes if k == "graph"}}
            )
            rest = {k: v for k, v in changes.items() if k != "graph"}
            found[name] = settings(Learner, {**self.learner, "network": gcn, **rest})
        return found

    def _configs(
        self, space: str, methods: tuple[tuple[str, Learner], ...], searches: tuple[str, ...]
    ) -> list[TruthConfig]:
        """One configuration a seed."""
        rest = methods, searches, self.held_out, self.samples, self.chosen
        return [
            TruthConfig(tabular.in_turn(space, seed), seed, *rest) for seed in range(self.seeds)
        ]

    def more(self, base: Study, learners: Mapping[str, Learner], workers: int, scale: str) -> Study:
        """Return a study with further learners, on the same seeds and held-out inputs."""
        policies = tuple(learners.items())
        configs = self._configs(self.space, policies, ())
        found, _ = _records("truth", self.space, configs, study, workers, scale)
        return Study([*base.records, *found], base.source)

    def study(self, workers: int, scale: str, space: str = "", varied: bool = True) -> Study:
        """Return the study of this space, or of another, computing what is not recorded.

        Where the table is missing or not complete it is the recorded reference of ``scale``, if
        there is one.
        """
        space = space or self.space
        policies = tuple(self.methods(varied).items())
        # Searches train nothing: a change of the learner leaves their records as they are.
        configs = self._configs(space, policies, ())
        if varied:
            configs += self._configs(space, (), SEARCHES)
        return Study(*_records("truth", space, configs, study, workers, scale))

    def facts(self, scale: str) -> list[Record]:
        """Return the record of kind "space", or none where it can be neither computed nor found."""
        config = FactsConfig(self.space, self.rules)
        return _records("space", self.space, [config], describe, 1, scale)[0]


def _records(
    kind: str, space: str, configs: Sequence[Any], body: Body, workers: int, scale: str
) -> tuple[list[Record], str]:
    """Compute records, or find them in the reference; say which in words."""
    return RunStore.default().run_or_recall(
        kind, configs, body, recipe=RECIPE, data=tabular.checksum(space), workers=workers,
        lacking=tabular.lacks(space), scale=scale,
    )  # fmt: skip


@dataclass(frozen=True)
class FactsConfig:
    """A space to describe under rules."""

    space: str
    rules: tuple[str, ...]


def describe(run: Run) -> dict[str, Any]:
    """Say what a whole space holds; body of records of kind "space".

    Returns ``size``, ``computations`` (distinct ones), ``validation`` and ``test`` of the best by
    each, ``chosen`` (test accuracy of the best by validation), ``front`` (MAdds and test accuracy
    of those that no cheaper one beats), and for each of ``rules``: ``targets`` (what each
    primitive may become on some edge), mean size of a ``closure``, mean ``attainable`` validation
    gain and the share of architectures that are ``optimal`` already.
    """
    config: FactsConfig = run.config
    space = tabular.load(config.space)
    order = np.lexsort((-space.test, space.madds))
    best = np.maximum.accumulate(space.test[order])
    front = order[np.flatnonzero(np.diff(best, prepend=-1.0) > 0)]
    rules = {}
    for rule in config.rules:
        allowed = space.allowed(by_name(rule, space.primitives))
        closures = space.closures(allowed)
        gains = np.array([space.validation[c].max() for c in closures]) - space.validation
        names = space.primitives
        rules[rule] = {
            "targets": {
                source: [t for k, t in enumerate(names) if allowed[:, i, k].any() and t != source]
                for i, source in enumerate(names)
            },
            "closure": float(np.mean([len(c) for c in closures])),
            "attainable": _mean(gains),
            "optimal": _mean(gains == 0),
        }
        run.progress(len(rules), len(config.rules))
    return {
        "size": space.size,
        "computations": len(set(space.computation.tolist())),
        "validation": float(space.validation.max()),
        "test": float(space.test.max()),
        "chosen": float(space.test[space.validation.argmax()]),
        "front": [[float(space.madds[c]), round(float(space.test[c]), 6)] for c in front],
        "rules": rules,
    }
