"""Supernet training, REINFORCE on transitions, and derivation of the rewritten architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from natlib import data
from natlib.budget import Budget
from natlib.cost import Cost, network_cost
from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import Macro, MacroConfig
from natlib.network import CellNetwork
from natlib.policy import (
    GCNConfig,
    LSTMConfig,
    Policy,
    UniformLogits,
    build_logits,
)
from natlib.primitives import PRIMITIVES
from natlib.records import ADDED_LATER, Record, Run, RunStore
from natlib.train import (
    DataConfig,
    Part,
    TrainConfig,
    accuracies,
    device,
    macro_for,
    splits,
    stream,
    train_epochs,
    train_standalone,
)
from natlib.transitions import by_name


@dataclass(frozen=True)
class SpaceConfig:
    """The architectures p(beta) draws from, uniformly.

    ``nodes``: allowed numbers of intermediate nodes of a cell; ``degrees``: of incoming edges of a
    node, from any earlier nodes; each edge carries any of ``primitives``. A share ``loose_ends`` of
    the genotypes concatenates only nodes without outgoing edge (ENAS, VGG), the rest all nodes
    (DARTS). ENAS's own space is ``SpaceConfig((5,), ENAS_PRIMITIVES, loose_ends=1.0)``.
    """

    nodes: tuple[int, ...] = (4,)
    primitives: tuple[str, ...] = PRIMITIVES
    loose_ends: float = 0.0
    degrees: tuple[int, ...] = field(default=(2,), metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        for name in ("nodes", "degrees"):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < 1:
                raise NatlibError(f"{name} = {numbers}; it must hold numbers above 0")

    def sample(self, generator: torch.Generator) -> Genotype:
        """Draw a genotype."""
        nodes = self.nodes[_below(len(self.nodes), generator)]
        loose = float(torch.rand((), generator=generator)) < self.loose_ends
        return Genotype(*(self._cell(nodes, loose, generator) for _ in range(2)))

    def _cell(self, nodes: int, loose: bool, generator: torch.Generator) -> Cell:
        everyone = tuple(range(INPUTS, INPUTS + nodes))
        edges = tuple(
            Edge(_below(t, generator), t, self.primitives[_below(len(self.primitives), generator)])
            for t in everyone
            for _ in range(self._degree(generator))
        )
        used = {e.source for e in edges}
        return Cell(edges, tuple(n for n in everyone if n not in used) if loose else everyone)

    def _degree(self, generator: torch.Generator) -> int:
        if len(self.degrees) == 1:
            return self.degrees[0]
        return self.degrees[_below(len(self.degrees), generator)]


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


@dataclass(frozen=True)
class SupernetConfig:
    """Training of shared weights: one uniformly drawn architecture a step.

    SGD with momentum, cosine learning rate, gradient norm clipped. ``snapshots`` weights are kept,
    evenly spaced over training, the last at its end: the policy's alternation goes through them
    (see ``train_policy``).
    """

    data: DataConfig
    macro: MacroConfig
    space: SpaceConfig
    seed: int
    epochs: int
    batch: int = 64
    lr: float = 0.01
    lr_last: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    snapshots: int = 1
    watched: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.snapshots <= self.epochs:
            raise NatlibError(
                f"snapshots = {self.snapshots}; allowed are 1..{self.epochs} (the epochs)"
            )

    @property
    def snapshot_epochs(self) -> list[int]:
        """Numbers of finished epochs after which weights are kept."""
        return [(k + 1) * self.epochs // self.snapshots for k in range(self.snapshots)]


def build_supernet(config: SupernetConfig) -> CellNetwork:
    """Build the supernet of ``config`` on the compute device, freshly initialised."""
    network = CellNetwork(
        config.macro,
        nodes=max(config.space.nodes),
        primitives=config.space.primitives,
        generator=stream(config.seed, "weights"),
    )
    return network.to(device())


def train_supernet(run: Run) -> dict[str, Any]:
    """Train shared weights; body of records of kind "supernet".

    Artifacts "snapshot_0", ... hold the kept weights. Returns the mean training loss of each epoch
    and, every time weights are kept, the mean accuracy (0..1) of ``watched`` fixed random
    architectures on ``report`` images. Source: NAT, Sec. 4.3, Algorithm 1.
    """
    config: SupernetConfig = run.config
    report = splits(config.data).report
    network = build_supernet(config)
    watch = stream(config.seed, "watched")
    genotypes = [config.space.sample(watch) for _ in range(config.watched)]
    watched: list[list[float]] = []

    def keep(finished: int) -> None:
        if finished in config.snapshot_epochs:
            run.save_artifact(f"snapshot_{len(watched)}", network.state_dict())
            watched.append(accuracies(network, report.normalised, report.labels, genotypes))

    losses = train_epochs(
        run,
        network,
        lambda x, generator: network(x, config.space.sample(generator)),
        what="the supernet",
        kept={"watched": watched},
        after=keep,
    )
    return {"losses": losses, "watched": watched, "snapshot_epochs": config.snapshot_epochs}


BASELINES = ("moving", "rollouts", "released")


@dataclass(frozen=True)
class PolicyConfig:
    """REINFORCE training of one policy against one supernet's snapshots.

    ``supernet_key`` is the record of ``supernet``. Each update draws ``architectures`` inputs,
    ``rollouts`` rewritings of each, and ``reward_images`` search images; Adam maximises
    (R - baseline) log pi + ``entropy_weight`` H, where R is the accuracy gained (0..1). The
    ``baseline`` is "moving", a moving average of R, or "rollouts", the mean R of the other
    rewritings of the same input, which also takes out how much each input leaves to gain;
    "released" is the moving average of the authors' code (see ``policy_step``). ``gcn``
    is the policy network, which may be an LSTM: the field keeps the name that keys of records hold.
    Defaults are the published settings. Raises NatlibError on another baseline, on "rollouts" with
    fewer than two, on a ``first_snapshot`` that the supernet does not keep, and on more
    ``reward_images`` than search images.
    """

    supernet: SupernetConfig
    supernet_key: str
    transitions: str
    seed: int
    updates: int
    architectures: int = 1
    rollouts: int = 1
    reward_images: int = 64
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 5e-4
    entropy_weight: float = 0.003
    baseline: str = "moving"
    baseline_decay: float = 0.99
    gcn: GCNConfig | LSTMConfig = field(default_factory=GCNConfig)
    first_snapshot: int = 0

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise NatlibError(f"baseline {self.baseline!r} is not one of {', '.join(BASELINES)}")
        if self.baseline == "rollouts" and self.rollouts < 2:
            raise NatlibError(f"baseline 'rollouts' needs 2 rollouts or more, not {self.rollouts}")
        last = self.supernet.snapshots - 1
        if not 0 <= self.first_snapshot <= last:
            raise NatlibError(f"first_snapshot = {self.first_snapshot}; allowed are 0..{last}")
        if not 1 <= self.reward_images <= self.supernet.data.search:
            raise NatlibError(
                f"reward_images = {self.reward_images}; allowed are "
                f"1..{self.supernet.data.search} (the search images)"
            )


def load_supernet(config: SupernetConfig, key: str, snapshot: int = -1) -> CellNetwork:
    """Rebuild a trained supernet from its record, ``snapshot`` counted as in a list.

    The last one is kept, and shared by who asks for it again: leave it as it is. Raises NatlibError
    if the record is not there.
    """
    record = RunStore.default().find("supernet", key)
    if record is None:
        raise NatlibError(f"there is no supernet record {key}; run the supernet notebook first")
    name = f"snapshot_{range(config.snapshots)[snapshot]}"
    return _loaded(config, record.artifact(name), record.artifacts[name].sha256)


@lru_cache(maxsize=1)
def _loaded(config: SupernetConfig, weights: Path, sha256: str) -> CellNetwork:
    """Build a supernet with the weights in a file, which is known by its checksum as well."""
    network = build_supernet(config)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network


class Scores:
    """Accuracy (0..1) of genotypes with a supernet's weights on one part, each computed once."""

    def __init__(self, network: CellNetwork, part: Part) -> None:
        self.network, self.part = network, part
        self.known: dict[Genotype, float] = {}

    def __call__(self, genotypes: Sequence[Genotype]) -> list[float]:
        """Return the accuracies of genotypes, in order."""
        new = list(dict.fromkeys(g for g in genotypes if g not in self.known))
        found = accuracies(self.network, self.part.normalised, self.part.labels, new)
        self.known.update(zip(new, found, strict=True))
        return [self.known[g] for g in genotypes]


def build_policy(config: PolicyConfig) -> Policy:
    """Build the policy of ``config``, freshly initialised, on the CPU."""
    transitions = by_name(config.transitions, config.supernet.space.primitives)
    generator = stream(config.seed, "policy", config.transitions)
    return Policy(build_logits(len(transitions.primitives), config.gcn, generator), transitions)


def random_policy(transitions: str, space: SpaceConfig) -> Policy:
    """The policy that draws every allowed transition with equal probability."""
    rule = by_name(transitions, space.primitives)
    return Policy(UniformLogits(len(rule.primitives)), rule)


Reward = Callable[[Sequence[Genotype], Sequence[Genotype]], list[float]]


def advantages(
    rewards: Tensor, rollouts: int, kind: str, baseline: float | None, decay: float
) -> tuple[Tensor, float]:
    """Return rewards (B,) less a baseline, and the baseline that comes of them.

    ``rewards`` hold the ``rollouts`` of each input side by side. ``baseline`` starts (None) at the
    first mean; its ``kind`` is one of ``BASELINES``: "moving", a moving average of the rewards
    themselves; "released" averages R - baseline, as the released code does, and tends to half the
    mean; "rollouts" compares each reward with the mean of its input's other rollouts instead.
    """
    mean = float(rewards.mean())
    baseline = mean if baseline is None else baseline
    after = decay * baseline + (1 - decay) * (mean - baseline if kind == "released" else mean)
    if kind == "rollouts":
        groups = rewards.view(-1, rollouts)
        others = (groups.sum(1, keepdim=True) - groups) / (rollouts - 1)
        return (groups - others).flatten(), after
    return rewards - baseline, after


def policy_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[Genotype],
    rollouts: int,
    reward: Reward,
    baseline: float | None,
    entropy_weight: float,
    baseline_decay: float,
    generator: torch.Generator,
    kind: str = "moving",
) -> dict[str, float]:
    """One REINFORCE update; ``reward`` takes inputs and outputs, equally many, gives R of each.

    Returns the mean reward, the mean entropy of an architecture's transitions (nats) and the new
    ``baseline``, of the ``kind`` that ``advantages`` describes. Source: NAT, Sec. 4.3, Eqs. 9-10.
    """
    repeated = [g for g in inputs for _ in range(rollouts)]
    rollout = policy.sample(inputs, generator, times=rollouts)
    rewards = torch.tensor(reward(repeated, rollout.genotypes), dtype=torch.float32)
    advantage, after = advantages(rewards, rollouts, kind, baseline, baseline_decay)
    gain = (advantage * rollout.log_probability).mean()
    entropy = rollout.entropy.mean()
    optimizer.zero_grad(set_to_none=True)
    (-gain - entropy_weight * entropy).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return {
        "reward": float(rewards.mean()),
        "entropy": float(entropy.detach()),
        "baseline": after,
    }


def supernet_reward(network: CellNetwork, images: Tensor, labels: Tensor) -> Reward:
    """R(alpha | beta) = Acc(alpha, w) - Acc(beta, w) on the given images, without gradients.

    Each distinct genotype is evaluated once. Source: NAT, Sec. 3.1; NAT++, Eq. 1.
    """

    def reward(before: Sequence[Genotype], after: Sequence[Genotype]) -> list[float]:
        # An input beside its rewritings: they have most in common.
        pairs = zip(before, after, strict=True)
        distinct = list(dict.fromkeys(g for pair in pairs for g in pair))
        values = accuracies(network, images, labels, distinct)
        known = dict(zip(distinct, values, strict=True))
        return [known[a] - known[b] for b, a in zip(before, after, strict=True)]

    return reward


@torch.no_grad()
def transition_probabilities(policy: Policy, genotypes: Sequence[Genotype]) -> dict[str, Any]:
    """Mean probabilities of transitions over the edges of ``genotypes``.

    Returns ``matrix`` (2, K, K): mean probability of each target by stride and source (0 where no
    edge has that source), and ``fates``: mean probability that an edge is kept, becomes skip, null
    (0 where the space lacks them), or anything else.
    """
    batch = policy.encode(genotypes)
    p = policy.log_probabilities(batch).exp()[batch.present]
    source, stride = batch.primitives[batch.present], batch.strides()[batch.present]
    names = policy.transitions.primitives
    k = len(names)
    matrix = torch.zeros(2 * k, k).index_add_(0, stride * k + source, p)
    count = torch.bincount(stride * k + source, minlength=2 * k)
    kept = p.gather(1, source[:, None])[:, 0]
    fates = {"kept": float(kept.mean())}
    for fate, name in (("skip", "skip_connect"), ("null", "null")):
        fates[fate] = 0.0
        if name in names:
            column = names.index(name)
            fates[fate] = float((p[:, column] * (source != column)).mean())
    fates["other"] = 1 - sum(fates.values())
    return {
        "matrix": (matrix / count.clamp(min=1)[:, None]).view(2, k, k).tolist(),
        "fates": fates,
    }


def train_policy(run: Run) -> dict[str, Any]:
    """Train a policy by REINFORCE; body of records of kind "policy".

    The papers alternate epochs of w and theta. Because w is trained on uniformly drawn
    architectures it does not depend on theta, so training w once, keeping its snapshots, and
    sending theta through them in order is the same alternation, and one supernet serves every
    policy. ``first_snapshot`` skips the earliest. Artifact "weights" holds the policy. Source: NAT,
    Algorithm 1.
    """
    config: PolicyConfig = run.config
    parts = splits(config.supernet.data)
    policy = build_policy(config)
    assert isinstance(policy.logits, nn.Module)
    optimizer = torch.optim.Adam(
        policy.logits.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    log: dict[str, list[float]] = {"reward": [], "entropy": [], "baseline": []}
    fates: list[dict[str, float]] = []
    baseline: float | None = None
    if state := run.load_checkpoint():
        policy.logits.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        log, fates, baseline = state["log"], state["fates"], state["baseline"]
    space = config.supernet.space
    watch = stream(config.seed, "watched")
    watched = [space.sample(watch) for _ in range(64)]
    count = config.supernet.snapshots - config.first_snapshot
    loaded, network = -1, None
    for update in range(len(log["reward"]), config.updates):
        snapshot = config.first_snapshot + update * count // config.updates
        if network is None or snapshot != loaded:
            network = load_supernet(config.supernet, config.supernet_key, snapshot)
            loaded = snapshot
        if update % max(1, config.updates // 40) == 0:
            fates.append(transition_probabilities(policy, watched)["fates"])
        generator = stream(config.seed, "update", update)
        inputs = [space.sample(generator) for _ in range(config.architectures)]
        order = torch.randperm(len(parts.search.labels), generator=generator)
        index = order[: config.reward_images].to(parts.search.labels.device)
        reward = supernet_reward(
            network, parts.search.normalised[index], parts.search.labels[index]
        )
        step = policy_step(
            policy,
            optimizer,
            inputs,
            config.rollouts,
            reward,
            baseline,
            config.entropy_weight,
            config.baseline_decay,
            generator,
            config.baseline,
        )
        baseline = step["baseline"]
        for name, values in log.items():
            values.append(step[name])
        run.progress(update + 1, config.updates)
        if run.checkpoint_due():
            run.save_checkpoint(
                {
                    "policy": policy.logits.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "log": log,
                    "fates": fates,
                    "baseline": baseline,
                }
            )
    final = transition_probabilities(policy, watched)
    fates.append(final["fates"])
    run.save_artifact("weights", policy.logits.state_dict())
    return {"log": log, "fates": fates, "matrix": final["matrix"]}


def load_policy(config: PolicyConfig, key: str) -> Policy:
    """Rebuild a trained policy from its record; raises NatlibError if it is not there."""
    record = RunStore.default().find("policy", key)
    if record is None:
        raise NatlibError(f"there is no policy record {key}; run the policy notebook first")
    policy = build_policy(config)
    assert isinstance(policy.logits, nn.Module)
    policy.logits.load_state_dict(record.load("weights"))
    return policy


@dataclass(frozen=True)
class Derived:
    """What ``derive`` chose: the genotype, its score, and all candidates it looked at.

    ``candidates`` holds (genotype, score) of every distinct one within budget, the input first;
    ``dropped`` counts those over budget.
    """

    genotype: Genotype
    score: float
    candidates: list[tuple[Genotype, float]]
    dropped: int


def derive(
    policy: Policy,
    genotype: Genotype,
    samples: int,
    score: Callable[[Sequence[Genotype]], list[float]],
    macro: Macro,
    generator: torch.Generator,
    budget: Budget | Cost | None = None,
) -> Derived:
    """Sample rewritings, drop those over budget, keep the one with the best validation score.

    The input itself is always a candidate (the published search forgets it), so the result never
    scores below it. ``budget`` defaults to the input's params and MAdds, counted in ``macro``,
    be it the supernet's or that of the network to be trained. Source: NAT, Sec. 4.3 (10 samples);
    the authors' code selects on test data, here ``score`` must use validation data.
    Raises NatlibError if the input itself is over a given budget and no candidate is within it.
    """
    given = network_cost(genotype, macro) if budget is None else budget
    limit = Budget.of(given) if isinstance(given, Cost) else given
    with torch.no_grad():
        sampled = policy.sample([genotype] * samples, generator).genotypes if samples else []
    distinct = dict.fromkeys([genotype, *sampled])
    within = [g for g in distinct if limit.allows(g, macro)]
    if not within:
        raise NatlibError(f"none of {len(distinct)} candidates is within the budget {given}")
    candidates = list(zip(within, score(within), strict=True))
    best, value = max(candidates, key=lambda pair: pair[1])
    return Derived(best, value, candidates, len(distinct) - len(within))


@dataclass(frozen=True)
class GainConfig:
    """What policies gain on held-out random architectures, by one supernet.

    ``policies`` are (config, record key) of trained ones; uniform random transitions of each of
    ``random`` rules are measured beside them. ``genotypes`` inputs are drawn by a stream of their
    own, with all nodes concatenated and ``nodes`` nodes. Results are named after rules: raises
    NatlibError on two policies of one rule. Weights of ``snapshot`` judge.
    """

    supernet: SupernetConfig
    supernet_key: str
    policies: tuple[tuple[PolicyConfig, str], ...]
    random: tuple[str, ...]
    genotypes: int
    images: int
    seed: int
    snapshot: int = field(default=-1, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_distinct_rules(self.policies)


def require_distinct_rules(policies: Sequence[tuple[PolicyConfig, str]]) -> None:
    """Refuse policies whose results would stand under one name."""
    rules = [config.transitions for config, _ in policies]
    if len(set(rules)) < len(rules):
        raise NatlibError(f"rules {', '.join(rules)}: results go by rule, so give each one policy")


GROUP = 32
"""Genotypes that share a memo of their common parts, and lie between two checkpoints."""


def measure_gain(run: Run) -> dict[str, Any]:
    """Measure supernet accuracy before and after one rewriting; body of records of kind "gain".

    Accuracy (0..1) on ``images`` report images, which no training, reward or selection saw, other
    ones for each seed.
    Returns for the inputs and for each method ("natpp", "natpp argmax", "natpp random", ...) lists
    over the same architectures: ``accuracy``, ``params``, ``madds``.
    """
    config: GainConfig = run.config
    parts = splits(config.supernet.data)
    report = parts.report.share(config.images, config.seed)
    network = load_supernet(config.supernet, config.supernet_key, config.snapshot)
    space = SpaceConfig((config.supernet.space.nodes[0],), config.supernet.space.primitives)
    generator = stream(config.seed, "held out")
    inputs = [space.sample(generator) for _ in range(config.genotypes)]
    outputs: dict[str, list[Genotype]] = {"input": inputs}
    with torch.no_grad():
        for policy_config, key in config.policies:
            policy = load_policy(policy_config, key)
            name = policy_config.transitions
            outputs[name] = policy.sample(inputs, stream(config.seed, name)).genotypes
            outputs[f"{name} argmax"] = policy.most_likely(inputs)
        for name in config.random:
            policy = random_policy(name, space)
            draw = stream(config.seed, name, "random")
            outputs[f"{name} random"] = policy.sample(inputs, draw).genotypes
    # An input beside its rewritings: they have most in common.
    by_input = zip(*outputs.values(), strict=True)
    everything = list(dict.fromkeys(g for genotypes in by_input for g in genotypes))
    values: list[float] = []
    if state := run.load_checkpoint():
        values = state.get("accuracies", [])
    for start in range(len(values), len(everything), GROUP):
        group = everything[start : start + GROUP]
        values += accuracies(network, report.normalised, report.labels, group)
        run.progress(len(values), len(everything))
        if run.checkpoint_due():
            run.save_checkpoint({"accuracies": values})
    known = dict(zip(everything, values, strict=True))
    result: dict[str, Any] = {}
    for name, genotypes in outputs.items():
        costs = [network_cost(g, config.supernet.macro) for g in genotypes]
        result[name] = {
            "accuracy": [known[g] for g in genotypes],
            "params": [c.params for c in costs],
            "madds": [c.madds for c in costs],
        }
    return result


@dataclass(frozen=True)
class DeriveConfig:
    """Derivation of named genotypes by trained policies, by one supernet.

    Results are named after rules: raises NatlibError on two policies of one rule. ``budget`` holds
    for all of them, None allows each what its input costs.
    """

    supernet: SupernetConfig
    supernet_key: str
    policies: tuple[tuple[PolicyConfig, str], ...]
    genotypes: tuple[tuple[str, Genotype], ...]
    samples: int
    seed: int
    budget: Budget | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_distinct_rules(self.policies)


def derive_many(run: Run) -> dict[str, Any]:
    """Derive from each genotype with each policy; body of records of kind "derive".

    Candidates are chosen on ``search`` images; accuracies (0..1) of input and choice are reported
    on ``report`` images. Returns {genotype name: {rule: {...}}}.
    """
    config: DeriveConfig = run.config
    parts = splits(config.supernet.data)
    network = load_supernet(config.supernet, config.supernet_key)
    macro = config.supernet.macro
    total = len(config.genotypes) * len(config.policies)
    result: dict[str, Any] = {}
    score, report = Scores(network, parts.search), Scores(network, parts.report)
    policies = [(c.transitions, load_policy(c, key)) for c, key in config.policies]
    for name, genotype in config.genotypes:
        result[name] = {}
        before = network_cost(genotype, macro)
        for rule, policy in policies:
            generator = stream(config.seed, "derive", name, rule)
            found = derive(policy, genotype, config.samples, score, macro, generator, config.budget)
            after = network_cost(found.genotype, macro)
            old, new = report([genotype, found.genotype])
            result[name][rule] = {
                "genotype": found.genotype.to_json(),
                "changed": found.genotype != genotype,
                "before_accuracy": old,
                "accuracy": new,
                "before_params": before.params,
                "params": after.params,
                "before_madds": before.madds,
                "madds": after.madds,
                "candidates": len(found.candidates),
                "dropped": found.dropped,
            }
            run.progress(sum(len(r) for r in result.values()), total)
    return result


RECIPES = {
    "supernet": 1, "policy": 1, "gain": 2, "derive": 1, "score": 1, "train": 1, "rewrite": 1,
    "candidates": 2,
}  # fmt: skip
"""Versions of what the bodies do: raised when the meaning of a result changes."""


def require_rewritable(genotype: Genotype, space: SpaceConfig, degree: int) -> None:
    """Refuse a genotype that supernets of ``space`` and policies of in-degree ``degree`` lack.

    Raises NatlibError on more nodes, another primitive, and a node with more incoming edges.
    """
    for name, cell in genotype.cells:
        if cell.nodes > max(space.nodes):
            raise NatlibError(
                f"the {name} cell has {cell.nodes} nodes; supernets of these settings have "
                f"{max(space.nodes)} (`space: {{nodes: ...}}` in experiments.yml)"
            )
        for edge in cell.edges:
            if edge.primitive not in space.primitives:
                raise NatlibError(
                    f"primitive {edge.primitive!r} in the {name} cell is not in the search space; "
                    f"allowed are {', '.join(space.primitives)}"
                )
        if (most := max(Counter(e.target for e in cell.edges).values(), default=0)) > degree:
            raise NatlibError(
                f"a node of the {name} cell has {most} incoming edges; policies of these settings "
                f"take {degree} (`policy: {{gcn: {{degree: ...}}}}` in experiments.yml, for which "
                "supernet and policy are trained anew)"
            )


def _of_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type, of tuples or of alternatives; others are not judged."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_of_type(value, one) for one in get_args(hint))
    if origin is tuple and isinstance(value, tuple):
        items = get_args(hint)
        kinds = items[:1] * len(value) if items[-1:] == (...,) else items
        return len(kinds) == len(value) and all(map(_of_type, value, kinds))
    if hint in (int, float):
        plain = int | float if hint is float else int
        return isinstance(value, plain) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def settings(kind: type, given: Mapping[str, Any]) -> Any:
    """Build a configuration from a notebook's mapping; lists become tuples.

    Raises NatlibError on a name that the configuration does not have, listing those it has, and on
    a value of another type.
    """
    allowed = [f.name for f in fields(kind)]
    for name in given:
        if name not in allowed:
            raise NatlibError(
                f"unknown setting {name!r} of {kind.__name__}; allowed are {', '.join(allowed)}"
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _of_type(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            hint = " (YAML reads 1e-3 as text: write 0.001)" if isinstance(value, str) else ""
            raise NatlibError(f"{kind.__name__}: {name} = {value!r} must be {wanted}{hint}")
    try:
        return kind(**values)
    except TypeError as error:
        raise NatlibError(f"{kind.__name__}: {error}") from None


@dataclass(frozen=True)
class Setting:
    """What the notebooks share: images, macro architecture, space and supernet training.

    ``images`` are ``DataConfig``'s sizes, ``macro`` has ``channels`` and ``cells``, ``space`` is a
    ``SpaceConfig``'s mapping, ``supernet`` the rest of a ``SupernetConfig``; ``seeds`` are those of
    the supernets. ``dataset`` may be "auto". Mappings come from experiments.yml.
    """

    dataset: str
    seeds: Sequence[int]
    images: Mapping[str, Any]
    macro: Mapping[str, Any]
    space: Mapping[str, Any]
    supernet: Mapping[str, Any]
    workers: int

    def data(self) -> DataConfig:
        """The images, with "auto" resolved to a data set that can be had."""
        name = data.load(self.dataset).name
        config: DataConfig = settings(DataConfig, {"dataset": name, **self.images})
        return config

    def supernet_configs(self) -> list[SupernetConfig]:
        """One configuration a seed."""
        if set(self.macro) != {"channels", "cells"}:
            raise NatlibError(f"macro must have channels and cells, not {', '.join(self.macro)}")
        images = self.data()
        shared = {
            "data": images,
            "macro": macro_for(images, self.macro["channels"], self.macro["cells"]),
            "space": settings(SpaceConfig, self.space),
            **self.supernet,
        }
        return [settings(SupernetConfig, {**shared, "seed": seed}) for seed in self.seeds]

    def records(
        self, kind: str, configs: Sequence[Any], body: Callable[[Run], Any]
    ) -> list[Record]:
        """Compute, or return, the records of ``configs`` on this setting's images."""
        return RunStore.default().run_many(
            kind,
            configs,
            body,
            recipe=RECIPES[kind],
            data=splits(self.data()).checksum,
            workers=self.workers,
        )

    def supernets(self) -> list[tuple[SupernetConfig, Record]]:
        """The trained supernets, one a seed."""
        configs = self.supernet_configs()
        return list(zip(configs, self.records("supernet", configs, train_supernet), strict=True))

    def policies(
        self, rules: Sequence[str], policy: Mapping[str, Any]
    ) -> list[tuple[PolicyConfig, Record]]:
        """Trained policies of each rule on each supernet, the rules of a seed side by side.

        ``policy`` maps fields of ``PolicyConfig``, those of ``GCNConfig`` under ``gcn``, or those
        of ``LSTMConfig`` under ``lstm``. Raises NatlibError where both are given.
        """
        if "gcn" in policy and "lstm" in policy:
            raise NatlibError("a policy's network is given twice: allowed is one of 'gcn', 'lstm'")
        given = dict(policy)
        if "lstm" in policy:
            given["gcn"] = settings(LSTMConfig, given.pop("lstm"))
        else:
            given["gcn"] = settings(GCNConfig, policy.get("gcn", {}))
        configs = [
            settings(
                PolicyConfig,
                {
                    "supernet": config,
                    "supernet_key": record.key,
                    "transitions": rule,
                    "seed": config.seed,
                    **given,
                },
            )
            for config, record in self.supernets()
            for rule in rules
        ]
        return list(zip(configs, self.records("policy", configs, train_policy), strict=True))

    def gains(
        self,
        policies: Sequence[tuple[PolicyConfig, Record]],
        random: Sequence[str],
        genotypes: int,
        images: int,
        snapshot: int = -1,
    ) -> list[Record]:
        """What the policies gain on held-out architectures, one record a supernet."""
        configs = [
            GainConfig(
                supernet, record.key, _of(policies, record.key), tuple(random), genotypes, images,
                supernet.seed, snapshot,
            )
            for supernet, record in self.supernets()
        ]  # fmt: skip
        return self.records("gain", configs, measure_gain)

    def scores(self, genotypes: Sequence[Genotype], snapshot: int = -1) -> list[Record]:
        """Accuracy of genotypes with shared weights, one record a supernet."""
        configs = [ScoreConfig(c, r.key, tuple(genotypes), snapshot) for c, r in self.supernets()]
        return self.records("score", configs, score_genotypes)

    def derived(
        self,
        policies: Sequence[tuple[PolicyConfig, Record]],
        genotypes: Mapping[str, Genotype],
        samples: int,
    ) -> list[Record]:
        """What the policies derive from named genotypes, one record a supernet."""
        configs = [
            DeriveConfig(
                supernet, record.key, _of(policies, record.key), tuple(genotypes.items()), samples,
                supernet.seed,
            )
            for supernet, record in self.supernets()
        ]  # fmt: skip
        return self.records("derive", configs, derive_many)

    def trained(
        self, genotypes: Sequence[Genotype], seeds: Sequence[int], training: Mapping[str, Any]
    ) -> list[list[Record]]:
        """Networks trained from scratch: one list of records, a seed each, for each genotype."""
        images = self.data()
        macro = macro_for(images, self.macro["channels"], self.macro["cells"])
        configs = [
            settings(
                TrainConfig,
                {"data": images, "macro": macro, "genotype": g, "seed": seed, **training},
            )
            for g in genotypes
            for seed in seeds
        ]
        found = self.records("train", configs, train_standalone)
        return [found[i : i + len(seeds)] for i in range(0, len(found), len(seeds))]


def _of(
    policies: Sequence[tuple[PolicyConfig, Record]], supernet: str
) -> tuple[tuple[PolicyConfig, str], ...]:
    return tuple((c, r.key) for c, r in policies if c.supernet_key == supernet)


@dataclass(frozen=True)
class ScoreConfig:
    """Genotypes to score with one supernet's weights, its ``snapshot``."""

    supernet: SupernetConfig
    supernet_key: str
    genotypes: tuple[Genotype, ...]
    snapshot: int = field(default=-1, metadata=ADDED_LATER)


def score_genotypes(run: Run) -> dict[str, Any]:
    """Accuracy (0..1) of genotypes on all report images; body of records of kind "score"."""
    config: ScoreConfig = run.config
    report = splits(config.supernet.data).report
    network = load_supernet(config.supernet, config.supernet_key, config.snapshot)
    values: list[float] = []
    for start in range(0, len(config.genotypes), GROUP):
        group = config.genotypes[start : start + GROUP]
        values += accuracies(network, report.normalised, report.labels, group)
        run.progress(len(values), len(config.genotypes))
    return {"accuracy": values}
