from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from natlib import NatlibError, data, handcrafted, search
from natlib.compare import RewriteConfig
from natlib.cost import Cost, network_cost
from natlib.genotype import INPUTS, Genotype
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.policy import (
    GCNConfig,
    GCNLogits,
    LSTMConfig,
    Policy,
    UniformLogits,
    build_logits,
)
from natlib.primitives import (
    ALL_PRIMITIVES,
    ENAS_PRIMITIVES,
    NAO_PRIMITIVES,
    NAT_PRIMITIVES,
    PRIMITIVES,
)
from natlib.records import Record, RunStore, as_json
from natlib.search import (
    DeriveConfig,
    GainConfig,
    PolicyConfig,
    ScoreConfig,
    Scores,
    Setting,
    SpaceConfig,
    SupernetConfig,
    build_policy,
    build_supernet,
    derive,
    derive_many,
    load_policy,
    load_supernet,
    measure_gain,
    policy_step,
    random_policy,
    require_rewritable,
    score_genotypes,
    supernet_reward,
    train_policy,
    train_supernet,
    transition_probabilities,
)
from natlib.train import accuracies, accuracy, splits, stream
from natlib.transitions import RULES, by_name, edge_stride
from natlib.zoo import ZOO
from tests.made import DATA, load, resumed_equals_uninterrupted, run, same
from tests.strategies import generator, genotypes, luck, lucks, macros, random_genotypes

MACRO = MacroConfig(channels=4, cells=3, classes=4, image_size=8)
SPACE = SpaceConfig((2,))
SUPERNET = SupernetConfig(
    DATA, MACRO, SPACE, seed=0, epochs=3, batch=16, lr=0.1, snapshots=2, watched=3
)
SMALL = GCNConfig(embedding=8, feature=32, hidden=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A trained supernet, trained once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        splits.cache_clear()
        return run(tmp_path_factory.mktemp("trained"), "supernet", SUPERNET, train_supernet)


@pytest.fixture
def supernet(trained: Record, made_images: None) -> Record:
    """The trained supernet as a record of the test's own default store."""
    store = RunStore.default()
    shutil.copytree(trained.path.parents[2], store.root)
    record = store.find("supernet", trained.key)
    assert record is not None
    return record


def policy_config(record: Record, **changes: Any) -> PolicyConfig:
    base = PolicyConfig(
        SUPERNET, record.key, "natpp", seed=0, updates=6, architectures=2, rollouts=2,
        reward_images=20, gcn=SMALL,
    )  # fmt: skip
    return replace(base, **changes)


def trained_policy(record: Record, **changes: Any) -> tuple[PolicyConfig, str]:
    config = policy_config(record, **changes)
    made = RunStore.default().run("policy", config, train_policy, recipe=1, data="")
    return config, made.key


# --- the space ---------------------------------------------------------------------------------


def test_the_space_is_drawn_uniformly() -> None:
    drawn = random_genotypes(1500)
    assert all(g.normal.nodes == g.reduce.nodes == 4 for g in drawn)
    assert all(cell.concat == (2, 3, 4, 5) for g in drawn for _, cell in g.cells)
    assert all(len(group) == 2 for g in drawn for _, c in g.cells for group in c.in_edges)
    edges = [e for g in drawn for _, c in g.cells for e in c.edges]

    def uniform(values: list[Any], over: int) -> None:
        counts, expected = Counter(values), len(values) / over
        assert len(counts) == over
        # Five standard deviations of a count.
        assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in counts.values())

    uniform([e.primitive for e in edges], 13)
    for target in range(2, 6):
        uniform([e.source for e in edges if e.target == target], target)


def test_the_space_may_have_several_sizes_other_primitives_and_loose_ends() -> None:
    space = SpaceConfig((4, 5), NAT_PRIMITIVES, loose_ends=0.5)
    draw = generator()
    drawn = [space.sample(draw) for _ in range(300)]
    assert {g.normal.nodes for g in drawn} == {4, 5}
    assert {p for g in drawn for p in g.primitives} == set(NAT_PRIMITIVES)
    loose = 0
    for g in drawn:
        assert g.normal.nodes == g.reduce.nodes
        for _, cell in g.cells:
            used = {e.source for e in cell.edges}
            everyone = tuple(range(INPUTS, INPUTS + cell.nodes))
            ends = tuple(n for n in everyone if n not in used)
            assert cell.concat in (everyone, ends)
        loose += any(len(c.concat) < c.nodes for _, c in g.cells)
    assert 100 < loose < 200


def test_the_space_may_have_other_numbers_of_incoming_edges() -> None:
    draw = generator()
    drawn = [SpaceConfig((3,), degrees=(1, 3)).sample(draw) for _ in range(300)]
    groups = [group for g in drawn for _, c in g.cells for group in c.in_edges]
    ones = sum(len(group) == 1 for group in groups)
    assert {len(group) for group in groups} == {1, 3}
    assert abs(ones - len(groups) / 2) < 5 * math.sqrt(len(groups)) / 2
    # A policy and a supernet take them; records of the space with two edges are still found.
    policy = Policy(GCNLogits(13, GCNConfig(8, 16, 12, degree=3), draw), by_name("natpp"))
    after = policy.sample(drawn, draw).genotypes
    assert all(policy.transitions.violations(b, a) == [] for b, a in zip(drawn, after, strict=True))
    supernet = CellNetwork(MACRO, nodes=3, primitives=PRIMITIVES)
    side = MACRO.image_size
    assert supernet(torch.zeros(2, 3, side, side), after[0]).shape == (2, MACRO.classes)
    assert "degrees" not in as_json(SpaceConfig()) and "degrees" in as_json(
        SpaceConfig(degrees=(3,))
    )


@pytest.mark.parametrize("bad", [{"nodes": ()}, {"nodes": (0,)}, {"degrees": (2, 0)}])
def test_spaces_without_nodes_or_edges_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(NatlibError, match=rf"{next(iter(bad))} = .* must hold numbers above 0"):
        SpaceConfig(**bad)


def test_enas_and_nao_have_spaces_of_their_own() -> None:
    draw = generator()
    enas = SpaceConfig((5,), ENAS_PRIMITIVES, loose_ends=1.0)
    nao = SpaceConfig((5,), NAO_PRIMITIVES, loose_ends=1.0)
    # The published cells lie in these spaces: the same nodes, primitives and concat.
    for space, published in ((enas, ZOO["ENAS"]), (nao, ZOO["NAONet"])):
        for g in (published, *(space.sample(draw) for _ in range(20))):
            assert set(g.primitives) <= set(space.primitives)
            for _, cell in g.cells:
                used = {e.source for e in cell.edges}
                assert cell.nodes == 5 and all(len(group) == 2 for group in cell.in_edges)
                assert set(cell.concat) == {n for n in range(2, 7) if n not in used}


def test_drawing_follows_its_generator() -> None:
    state = torch.random.get_rng_state()
    assert random_genotypes(5) == random_genotypes(5)
    assert random_genotypes(5) != random_genotypes(5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- supernet ----------------------------------------------------------------------------------


def test_snapshots_are_evenly_spaced_and_end_with_training() -> None:
    assert replace(SUPERNET, epochs=10, snapshots=4).snapshot_epochs == [2, 5, 7, 10]
    assert replace(SUPERNET, epochs=3, snapshots=3).snapshot_epochs == [1, 2, 3]
    assert replace(SUPERNET, epochs=9, snapshots=1).snapshot_epochs == [9]
    for wrong in (0, 4):
        with pytest.raises(NatlibError, match=rf"snapshots = {wrong}.*1\.\.3"):
            replace(SUPERNET, snapshots=wrong)


def test_supernet_training_learns_and_keeps_its_weights(supernet: Record) -> None:
    assert supernet.result["snapshot_epochs"] == [1, 3]
    assert len(supernet.result["losses"]) == 3
    assert supernet.result["losses"][-1] < supernet.result["losses"][0]
    assert set(supernet.artifacts) == {"snapshot_0", "snapshot_1"}
    assert not same(supernet.load("snapshot_0"), supernet.load("snapshot_1"))
    # The watched accuracies are those of the kept weights on report images.
    draw = stream(SUPERNET.seed, "watched")
    watched = [SPACE.sample(draw) for _ in range(3)]
    report = splits(DATA).report
    for i, values in enumerate(supernet.result["watched"]):
        network = load_supernet(SUPERNET, supernet.key, i)
        found = [accuracy(network, report.normalised, report.labels, g) for g in watched]
        assert values == found
    last = load_supernet(SUPERNET, supernet.key)
    assert same(last.state_dict(), supernet.load("snapshot_1"))


def test_a_supernet_is_built_once_until_other_weights_are_asked_for(supernet: Record) -> None:
    last = load_supernet(SUPERNET, supernet.key)
    assert load_supernet(SUPERNET, supernet.key, 1) is last
    first = load_supernet(SUPERNET, supernet.key, 0)
    assert same(first.state_dict(), supernet.load("snapshot_0"))
    assert load_supernet(SUPERNET, supernet.key) is not last
    # The same file with other weights is another supernet.
    file = supernet.artifact("snapshot_1")
    assert search._loaded(SUPERNET, file, "one") is search._loaded(SUPERNET, file, "one")
    assert search._loaded(SUPERNET, file, "one") is not search._loaded(SUPERNET, file, "other")


def test_scores_are_those_of_each_genotype_computed_once(
    supernet: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, part = load_supernet(SUPERNET, supernet.key), splits(DATA).search
    draw = stream(0, "scores")
    a, b, c = (SPACE.sample(draw) for _ in range(3))
    expected = [accuracy(network, part.normalised, part.labels, g) for g in (a, b, c)]
    seen: list[Genotype] = []

    def counted(network: Any, images: Any, labels: Any, genotypes: Sequence[Genotype]) -> Any:
        seen.extend(genotypes)
        return accuracies(network, images, labels, genotypes)

    monkeypatch.setattr(search, "accuracies", counted)
    score = Scores(network, part)
    assert score([b, a, b]) == [expected[1], expected[0], expected[1]]
    assert score([c, b]) == [expected[2], expected[1]]
    assert seen == [b, a, c]


@pytest.mark.usefixtures("made_images")
def test_supernet_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    config = replace(SUPERNET, snapshots=3, epochs=4, lr_last=0.01)
    resumed_equals_uninterrupted(tmp_path, "supernet", config, train_supernet, (2, 4, 5))


@pytest.mark.usefixtures("made_images")
def test_supernet_of_one_seed_is_the_same_and_of_another_is_not(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    short = replace(SUPERNET, epochs=1, snapshots=1)
    one, two, other = (
        run(tmp_path / name, "supernet", replace(short, seed=seed), train_supernet)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.result == two.result
    assert same(one.load("snapshot_0"), two.load("snapshot_0"))
    assert not same(one.load("snapshot_0"), other.load("snapshot_0"))


@pytest.mark.usefixtures("made_images")
def test_supernet_divergence_is_said(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match=r"supernet diverged in epoch 1.*1e\+30"):
        run(tmp_path, "supernet", replace(SUPERNET, lr=1e30, lr_last=1e30), train_supernet)


def spoilt(parts: Any, *names: str) -> Any:
    """Return splits whose named parts are ruined."""
    return replace(
        parts,
        **{
            name: replace(
                part, raw=255 - part.raw, normalised=-part.normalised, labels=3 - part.labels
            )
            for name in names
            for part in [getattr(parts, name)]
        },
    )


def test_only_training_images_reach_the_shared_weights(
    supernet: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruined = spoilt(splits(DATA), "search", "report", "test")
    monkeypatch.setattr(search, "splits", lambda config: ruined)
    other = run(tmp_path / "other", "supernet", SUPERNET, train_supernet)
    assert same(other.load("snapshot_1"), supernet.load("snapshot_1"))
    assert other.result["watched"] != supernet.result["watched"]


# --- reward ------------------------------------------------------------------------------------


def test_reward_is_the_accuracy_gained_without_gradients(supernet: Record) -> None:
    network = load_supernet(SUPERNET, supernet.key)
    part = splits(DATA).search
    before, after = random_genotypes(3, nodes=(2,)), random_genotypes(3, seed=1, nodes=(2,))
    reward = supernet_reward(network, part.normalised, part.labels)
    score = [accuracy(network, part.normalised, part.labels, g) for g in (*before, *after)]
    assert reward(before, after) == [score[3 + i] - score[i] for i in range(3)]
    assert reward(before, before) == [0.0] * 3
    assert all(p.grad is None for p in network.parameters())


def test_reward_looks_at_each_genotype_once(
    supernet: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Genotype] = []

    def count(
        network: object, images: Tensor, labels: Tensor, genotypes: Sequence[Genotype]
    ) -> list[float]:
        calls.extend(genotypes)
        return [0.5] * len(genotypes)

    monkeypatch.setattr(search, "accuracies", count)
    one, two = random_genotypes(2)
    supernet_reward(build_supernet(SUPERNET), torch.empty(0), torch.empty(0))(
        [one, one, one], [two, one, two]
    )
    assert sorted(calls, key=hash) == sorted([one, two], key=hash)


# --- REINFORCE ---------------------------------------------------------------------------------


def learner(rule: str = "natpp", lr: float = 0.0) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(GCNLogits(13, SMALL, generator()), by_name(rule))
    assert isinstance(policy.logits, nn.Module)
    return policy, torch.optim.SGD(policy.logits.parameters(), lr=lr)


def test_the_fused_optimizer_of_policies_is_the_plain_one() -> None:
    learned = []
    for fused in (True, False):
        policy, _ = learner()
        assert isinstance(policy.logits, nn.Module)
        weights = list(policy.logits.double().parameters())
        optimizer = torch.optim.Adam(
            weights, lr=0.01, betas=(0.5, 0.999), weight_decay=5e-4, fused=fused
        )
        draw = generator(3)
        for _ in range(5):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=draw, dtype=w.dtype)
            optimizer.step()
        learned.append(weights)
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def step(policy: Policy, optimizer: torch.optim.Optimizer, reward: Any, **given: Any) -> Any:
    arguments: dict[str, Any] = {
        "inputs": random_genotypes(3),
        "rollouts": 2,
        "baseline": None,
        "entropy_weight": 0.0,
        "baseline_decay": 0.9,
        "generator": generator(),
    }
    return policy_step(policy, optimizer, reward=reward, **{**arguments, **given})


def test_baseline_is_a_moving_average_of_the_rewards_themselves() -> None:
    policy, optimizer = learner()
    baseline: float | None = None
    expected = 0.0
    for i in range(60):
        value = 0.0 if i == 0 else 1.0
        out = step(policy, optimizer, lambda b, a, v=value: [v] * len(a), baseline=baseline)
        baseline = out["baseline"]
        assert out["reward"] == value
        expected = 0.9 * expected + 0.1 * value
        assert math.isclose(baseline, expected, abs_tol=1e-12)
    # The released code feeds back rewards less the baseline, and so ends at one half.
    assert baseline is not None
    assert baseline > 0.99


def test_the_released_baseline_ends_at_half_the_reward() -> None:
    policy, optimizer = learner()
    baseline: float | None = 0.0
    for _ in range(60):
        out = step(policy, optimizer, lambda b, a: [1.0] * len(a), baseline=baseline,
                   kind="released")  # fmt: skip
        baseline = out["baseline"]
    assert baseline == pytest.approx(0.5, abs=1e-3)


def test_among_rollouts_what_an_input_leaves_to_gain_does_not_count() -> None:
    policy, optimizer = learner(lr=0.1)
    assert isinstance(policy.logits, nn.Module)
    before = [p.clone() for p in policy.logits.parameters()]
    inputs = random_genotypes(3)
    # Every rewriting of an input earns the same: there is nothing to learn.
    worth = {g: float(i) for i, g in enumerate(inputs)}
    step(
        policy, optimizer, lambda b, a: [worth[g] for g in b],
        inputs=inputs, rollouts=4, kind="rollouts",
    )  # fmt: skip
    after = list(policy.logits.parameters())
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(before, after, strict=True))
    step(policy, optimizer, lambda b, a: [worth[g] for g in b], inputs=inputs, rollouts=4)
    assert not all(torch.allclose(p, q, atol=1e-7) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [({"baseline": "mean"}, "'mean'"), ({"baseline": "rollouts", "rollouts": 1}, "not 1")],
)
def test_baselines_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(NatlibError, match=words):
        PolicyConfig(SUPERNET, "key", "nat", 0, 1, **given)


def test_baseline_converges_to_the_mean_of_noisy_rewards() -> None:
    policy, optimizer = learner()
    draw = random.Random(0)
    baseline, seen = None, []
    for _ in range(400):
        out = step(
            policy, optimizer, lambda b, a: [draw.gauss(0.3, 0.1) for _ in a],
            baseline=baseline, baseline_decay=0.98,
        )  # fmt: skip
        baseline = out["baseline"]
        seen.append(baseline)
    assert abs(sum(seen[100:]) / 300 - 0.3) < 0.01


@pytest.mark.parametrize("among", [False, True])
def test_a_step_descends_the_published_gradient(among: bool) -> None:
    inputs, weight, baseline = random_genotypes(3), 0.01, 0.2
    rewards = [0.1, 0.5, -0.2, 0.0, 0.3, 0.7]
    policy, optimizer = learner(lr=0.5)
    assert isinstance(policy.logits, nn.Module)
    before = [p.detach().clone() for p in policy.logits.parameters()]
    rollout = policy.sample(inputs, generator(5), times=2)
    advantage = torch.tensor(rewards) - baseline
    if among:  # each of two rollouts less the other
        advantage = torch.tensor([-0.4, 0.4, -0.2, 0.2, -0.4, 0.4])
    objective = (advantage * rollout.log_probability).mean() + weight * rollout.entropy.mean()
    gradient = torch.autograd.grad(objective, list(policy.logits.parameters()))
    asked: list[Any] = []

    def reward(b: Sequence[Genotype], a: Sequence[Genotype]) -> list[float]:
        asked.append((list(b), list(a)))
        return rewards

    out = step(
        policy, optimizer, reward, inputs=inputs, baseline=baseline, entropy_weight=weight,
        generator=generator(5), kind="rollouts" if among else "moving",
    )  # fmt: skip
    assert asked == [([g for g in inputs for _ in range(2)], rollout.genotypes)]
    for p, old, g in zip(policy.logits.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(p.detach(), old + 0.5 * g, rtol=1e-5, atol=1e-6)
    assert math.isclose(out["reward"], sum(rewards) / 6, rel_tol=1e-6)
    assert math.isclose(out["entropy"], float(rollout.entropy.detach().mean()), rel_tol=1e-6)


def test_the_first_step_has_its_own_mean_as_baseline() -> None:
    policy, optimizer = learner(lr=1.0)
    assert isinstance(policy.logits, nn.Module)
    before = [p.detach().clone() for p in policy.logits.parameters()]
    out = step(policy, optimizer, lambda b, a: [0.7] * len(a))
    assert math.isclose(out["baseline"], 0.7, rel_tol=1e-6)
    for p, old in zip(policy.logits.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)


def test_entropy_alone_keeps_a_policy_open() -> None:
    policy, _ = learner()
    assert isinstance(policy.logits, GCNLogits)
    with torch.no_grad():
        policy.logits.head.weight.mul_(30)
    optimizer = torch.optim.Adam(policy.logits.parameters(), lr=1e-2)
    entropy = [
        step(policy, optimizer, lambda b, a: [0.0] * len(a), entropy_weight=1.0)["entropy"]
        for _ in range(60)
    ]
    uniform = Policy(UniformLogits(13), by_name("natpp"))
    with torch.no_grad():
        most = float(uniform.sample(random_genotypes(3), generator()).entropy.mean())
    assert entropy[0] < 0.7 * most
    assert entropy[-1] > 0.9 * most


@pytest.mark.parametrize(
    ("rule", "network"),
    [*((rule, GCNConfig(16, 64, 32)) for rule in RULES), ("natpp", LSTMConfig(32, 32))],
)
def test_a_policy_learns_the_best_transition_of_every_primitive(
    rule: str, network: GCNConfig | LSTMConfig
) -> None:
    """Reward: the share of edges that carry what a fixed table names as best for their primitive.

    Entropy first counts much, then little: with little from the start REINFORCE settles on what
    happened to be rewarded early.
    """
    transitions, draw = by_name(rule), random.Random(0)
    both = [transitions.pairs(1), transitions.pairs(2)]
    best = {
        s: draw.choice([t for t in PRIMITIVES if all((s, t) in pairs for pairs in both)])
        for s in PRIMITIVES
    }
    assert len(set(best.values())) > 2

    def reward(before: Sequence[Genotype], after: Sequence[Genotype]) -> list[float]:
        return [
            sum(best[s] == t for s, t in zip(b.primitives, a.primitives, strict=True))
            / len(b.primitives)
            for b, a in zip(before, after, strict=True)
        ]

    gen = generator()
    policy = Policy(build_logits(13, network, gen), transitions)
    assert isinstance(policy.logits, nn.Module)
    optimizer = torch.optim.Adam(policy.logits.parameters(), lr=1e-2, betas=(0.5, 0.999))
    pool = random_genotypes(1000, nodes=(1,))
    baseline = None
    for i in range(500):
        chosen = torch.randint(len(pool), (64,), generator=gen).tolist()
        out = policy_step(
            policy, optimizer, [pool[k] for k in chosen], 1, reward, baseline,
            0.12 if i < 300 else 0.02, 0.9, gen,
        )  # fmt: skip
        baseline = out["baseline"]
    unseen = random_genotypes(200, seed=7, nodes=(1,))
    batch = policy.encode(unseen)
    with torch.no_grad():
        p = policy.log_probabilities(batch).exp()[batch.present]
    right = torch.tensor([PRIMITIVES.index(best[n]) for g in unseen for n in g.primitives])
    mass = p.gather(1, right[:, None])
    assert float(mass.mean()) > 0.95
    found = policy.most_likely(unseen)
    assert sum(reward(unseen, found)) / len(unseen) > 0.98


# --- training a policy -------------------------------------------------------------------------


def test_policy_training_records_what_it_did(supernet: Record, tmp_path: Path) -> None:
    record = run(tmp_path / "p", "policy", policy_config(supernet), train_policy)
    log = record.result["log"]
    assert {name: len(values) for name, values in log.items()} == {
        "reward": 6, "entropy": 6, "baseline": 6
    }  # fmt: skip
    assert all(-1 <= r <= 1 for r in log["reward"])
    average = log["reward"][0]
    for reward, baseline in zip(log["reward"], log["baseline"], strict=True):
        average = 0.99 * average + 0.01 * reward
        assert math.isclose(baseline, average, abs_tol=1e-9)
    assert len(record.result["fates"]) == 7
    assert torch.tensor(record.result["matrix"]).shape == (2, 13, 13)


@pytest.mark.parametrize("changes", [{}, {"transitions": "nat", "first_snapshot": 1}])
def test_policy_stopped_and_resumed_equals_uninterrupted(
    supernet: Record, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = policy_config(supernet, **changes)
    resumed_equals_uninterrupted(tmp_path / "p", "policy", config, train_policy, (1, 3, 2))


def test_policy_of_one_seed_is_the_same_and_of_another_is_not(
    supernet: Record, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    one, two, other = (
        run(tmp_path / name, "policy", policy_config(supernet, seed=seed), train_policy)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.result == two.result
    assert same(one.load("weights"), two.load("weights"))
    assert not same(one.load("weights"), other.load("weights"))


def test_policy_sees_neither_report_nor_test_nor_training_images(
    supernet: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clean = policy_config(supernet), splits(DATA)
    one = run(tmp_path / "a", "policy", config, train_policy)
    for name, parts in (("b", ("train", "report", "test")), ("c", ("search",))):
        ruined = spoilt(clean, *parts)
        monkeypatch.setattr(search, "splits", lambda config, r=ruined: r)
        other = run(tmp_path / name, "policy", config, train_policy)
        assert (other.result == one.result) == (name == "b")


@pytest.mark.parametrize(("first", "used"), [(0, [0, 0, 0, 1, 1, 1]), (1, [1] * 6)])
def test_policy_goes_through_the_snapshots_in_order(
    supernet: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    used: list[int],
) -> None:
    loaded = load_supernet(SUPERNET, supernet.key)
    now, seen = [-1], []

    def pretend(config: SupernetConfig, key: str, snapshot: int = -1) -> Any:
        assert (config, key) == (SUPERNET, supernet.key)
        now[0] = snapshot
        return loaded

    def reward(network: object, images: Tensor, labels: Tensor) -> Any:
        seen.append(now[0])
        assert len(images) == len(labels) == 20
        return lambda before, after: [0.0] * len(after)

    monkeypatch.setattr(search, "load_supernet", pretend)
    monkeypatch.setattr(search, "supernet_reward", reward)
    run(tmp_path / "p", "policy", policy_config(supernet, first_snapshot=first), train_policy)
    assert seen == used


@pytest.mark.parametrize("network", [SMALL, LSTMConfig(8, 16)])
def test_a_trained_policy_is_loaded_as_it_was_saved(
    supernet: Record, network: GCNConfig | LSTMConfig
) -> None:
    config, key = trained_policy(supernet, gcn=network)
    policy = load_policy(config, key)
    fresh = build_policy(config)
    assert isinstance(policy.logits, nn.Module)
    assert isinstance(fresh.logits, nn.Module)
    record = RunStore.default().find("policy", key)
    assert record is not None
    assert same(policy.logits.state_dict(), record.load("weights"))
    assert not same(policy.logits.state_dict(), fresh.logits.state_dict())
    assert policy.transitions == by_name("natpp")


@pytest.mark.usefixtures("made_images")
def test_records_that_are_not_there() -> None:
    with pytest.raises(NatlibError, match="no supernet record 0123"):
        load_supernet(SUPERNET, "0123")
    config = PolicyConfig(SUPERNET, "0123", "natpp", 0, 1, reward_images=20, gcn=SMALL)
    with pytest.raises(NatlibError, match="no policy record 4567"):
        load_policy(config, "4567")


def test_bad_policy_configurations(supernet: Record, tmp_path: Path) -> None:
    for first in (-1, 2, 5):
        with pytest.raises(NatlibError, match=rf"first_snapshot = {first}.*0\.\.1"):
            policy_config(supernet, first_snapshot=first)
    with pytest.raises(NatlibError, match=r"'nat\+\+'.*natpp_cost_safe"):
        run(tmp_path / "p", "policy", policy_config(supernet, transitions="nat++"), train_policy)
    assert not list((tmp_path / "p").glob("*/*/record.json"))


def test_rewards_need_images_that_are_there(supernet: Record) -> None:
    for images in (0, SUPERNET.data.search + 1):
        with pytest.raises(NatlibError, match=rf"reward_images = {images}.*1\.\.\d+"):
            policy_config(supernet, reward_images=images)


# --- fates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_transition_probabilities_of_the_random_policy(rule: str) -> None:
    inputs = random_genotypes(300)
    found = transition_probabilities(random_policy(rule, SpaceConfig()), inputs)
    transitions = by_name(rule)
    edges = [(k, e) for g in inputs for k, c in g.cells for e in c.edges]
    fates = Counter[str]()
    for kind, e in edges:
        targets = [
            t for t in PRIMITIVES if transitions.allows(e.primitive, t, edge_stride(e.source, kind))
        ]
        for t in targets:
            name = {"skip_connect": "skip", "null": "null"}.get(t, "other")
            fates["kept" if t == e.primitive else name] += 1 / len(targets)
    for name in ("kept", "skip", "null", "other"):
        assert math.isclose(found["fates"][name], fates[name] / len(edges), abs_tol=1e-4)
    mask = transitions.mask()
    expected = mask / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found["matrix"]), expected, atol=1e-5, rtol=1e-5)


def test_sources_that_do_not_occur_have_rows_of_zeros() -> None:
    conv = Genotype.from_json(
        {
            "normal": [["conv_1x1", 0, 2]],
            "normal_concat": [2],
            "reduce": [["conv_1x1", 0, 2]],
            "reduce_concat": [2],
        }
    )
    matrix = torch.tensor(
        transition_probabilities(random_policy("nat", SpaceConfig()), [conv])["matrix"]
    )
    at = PRIMITIVES.index("conv_1x1")
    torch.testing.assert_close(matrix[:, at].sum(1), torch.ones(2))
    matrix[:, at] = 0
    assert not matrix.any()


# --- derive ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    genotypes(PRIMITIVES), st.sampled_from(sorted(RULES)), macros,
    st.integers(0, 12), st.integers(0, 2**32),
)  # fmt: skip
def test_what_is_derived_is_within_budget_and_no_worse_than_the_input(
    genotype: Genotype, rule: str, macro: MacroConfig, samples: int, seed: int
) -> None:
    policy = random_policy(rule, SpaceConfig())
    found = derive(policy, genotype, samples, lucks, macro, generator(seed))
    limit = network_cost(genotype, macro)
    assert network_cost(found.genotype, macro).within(limit)
    assert found.score == luck(found.genotype) >= luck(genotype)
    assert found.candidates[0] == (genotype, luck(genotype))
    assert len(dict(found.candidates)) == len(found.candidates)
    assert found.score == max(score for _, score in found.candidates)
    assert all(network_cost(g, macro).within(limit) for g, _ in found.candidates)
    assert all(policy.transitions.violations(genotype, g) == [] for g, _ in found.candidates)
    drawn = policy.sample([genotype] * samples, generator(seed)).genotypes if samples else []
    assert len(found.candidates) + found.dropped == len({genotype, *drawn})
    if rule == "natpp_cost_safe":
        assert found.dropped == 0
    assert derive(policy, genotype, samples, lucks, macro, generator(seed)) == found


@settings(max_examples=40)
@given(genotypes(PRIMITIVES), st.floats(0, 1.2), st.floats(0, 1.2), st.integers(0, 2**32))
def test_a_given_budget_is_never_exceeded(
    genotype: Genotype, params: float, madds: float, seed: int
) -> None:
    whole = network_cost(genotype, MACRO)
    budget = Cost(int(whole.params * params), int(whole.madds * madds))
    policy = random_policy("natpp", SpaceConfig())
    drawn = {genotype, *policy.sample([genotype] * 10, generator(seed)).genotypes}
    fits = [g for g in drawn if network_cost(g, MACRO).within(budget)]
    if not fits:
        with pytest.raises(NatlibError) as error:
            derive(policy, genotype, 10, lucks, MACRO, generator(seed), budget)
        assert str(budget) in str(error.value)
        assert str(len(drawn)) in str(error.value)
    else:
        found = derive(policy, genotype, 10, lucks, MACRO, generator(seed), budget)
        assert network_cost(found.genotype, MACRO).within(budget)
        assert found.score == max(map(luck, fits))
        assert found.dropped == len(drawn) - len(fits)


def test_fates_in_a_space_without_null() -> None:
    space = SpaceConfig(primitives=("conv_3x3", "conv_1x1", "skip_connect"))
    policy = random_policy("natpp", space)
    draw = generator()
    fates = transition_probabilities(policy, [space.sample(draw) for _ in range(3)])["fates"]
    assert fates["null"] == 0.0
    assert fates["skip"] > 0
    assert math.isclose(sum(fates.values()), 1.0)


def test_the_input_wins_a_tie_and_is_all_there_is_without_samples() -> None:
    policy = random_policy("natpp", SpaceConfig())
    darts = ZOO["DARTS"]
    assert (
        derive(policy, darts, 20, lambda gs: [0.5] * len(gs), MACRO, generator()).genotype == darts
    )
    found = derive(policy, darts, 0, lucks, MACRO, generator())
    assert (found.genotype, found.candidates, found.dropped) == (darts, [(darts, luck(darts))], 0)


def test_only_candidates_within_budget_are_scored_and_each_once() -> None:
    # NAT and NAT++ raise the cost where null becomes a skip that reduces.
    nulls = ZOO["VGG"].with_primitives(["null"] * 16)
    scored: list[Genotype] = []

    def score(genotypes: Sequence[Genotype]) -> list[float]:
        scored.extend(genotypes)
        return [0.0] * len(genotypes)

    found = derive(random_policy("nat", SpaceConfig()), nulls, 30, score, MACRO, generator())
    assert found.dropped > 0
    assert len(scored) == len(set(scored)) == len(found.candidates)
    assert all(network_cost(g, MACRO).within(network_cost(nulls, MACRO)) for g in scored)


@pytest.mark.parametrize("name", ["ENAS", "DARTS", "Mobilenetv2"])
def test_published_cells_of_any_shape_can_be_derived_from(name: str) -> None:
    found = derive(random_policy("natpp", SpaceConfig()), ZOO[name], 10, lucks, MACRO, generator())
    for (_, a), (_, b) in zip(ZOO[name].cells, found.genotype.cells, strict=True):
        assert a.concat == b.concat
    assert len(found.candidates) > 1


def test_a_policy_of_four_node_cells_rewrites_other_cells_and_hand_crafted_networks() -> None:
    """Over all primitives, NAONet's too: trained to save parameters, it does so where unseen."""
    macro = MacroConfig(channels=8, cells=3, image_size=8)

    def reward(before: Sequence[Genotype], after: Sequence[Genotype]) -> list[float]:
        return [
            1 - network_cost(a, macro).params / network_cost(b, macro).params
            for b, a in zip(before, after, strict=True)
        ]

    draw, rule = generator(), by_name("natpp", ALL_PRIMITIVES)
    space = SpaceConfig((4,), ALL_PRIMITIVES)
    policy = Policy(GCNLogits(len(ALL_PRIMITIVES), GCNConfig(16, 64, 32), draw), rule)
    assert isinstance(policy.logits, nn.Module)
    unseen = [ZOO[name] for name in ("NAONet", "ENAS", "DARTS", "VGG")]
    uniform = Policy(UniformLogits(len(ALL_PRIMITIVES)), rule)
    chance = [fmean(reward([g] * 100, uniform.sample([g] * 100, draw).genotypes)) for g in unseen]
    optimizer = torch.optim.Adam(policy.logits.parameters(), lr=1e-2, betas=(0.5, 0.999))
    baseline = None
    for _ in range(60):
        inputs = [space.sample(draw) for _ in range(16)]
        out = policy_step(policy, optimizer, inputs, 1, reward, baseline, 0.01, 0.9, draw)
        baseline = out["baseline"]
    found = policy.most_likely(unseen)
    for g, after, saved, by_chance in zip(
        unseen, found, reward(unseen, found), chance, strict=True
    ):
        assert rule.violations(g, after) == []
        assert saved > by_chance + 0.05
    for name in ("VGG16", "ResNet20", "MobileNetV2"):
        original, own = handcrafted.ORIGINALS[name], handcrafted.macro(name, "CIFAR-10")
        (after,) = policy.most_likely([original])
        assert rule.violations(original, after) == []
        # In an inverted residual a skip that widens is a projection, dearer than what it replaces:
        # no saving in DARTS-style cells tells a policy so.
        if name != "MobileNetV2":
            assert network_cost(after, own).params < 0.9 * network_cost(original, own).params


def test_deriving_touches_no_global_random_state() -> None:
    state = torch.random.get_rng_state()
    derive(random_policy("natpp", SpaceConfig()), ZOO["DARTS"], 10, lucks, MACRO, generator())
    assert torch.equal(torch.random.get_rng_state(), state)


# --- what notebooks ask for --------------------------------------------------------------------


def gain_config(record: Record) -> GainConfig:
    return GainConfig(
        SUPERNET, record.key, (trained_policy(record),), ("natpp", "nat"), 4, images=30, seed=0
    )


def test_two_policies_of_one_rule_are_refused(supernet: Record) -> None:
    trained = trained_policy(supernet)
    both = (trained, trained)
    with pytest.raises(NatlibError, match="rules natpp, natpp"):
        GainConfig(SUPERNET, supernet.key, both, (), 4, images=30, seed=0)
    with pytest.raises(NatlibError, match="rules natpp, natpp"):
        DeriveConfig(SUPERNET, supernet.key, both, (), samples=2, seed=0)
    genotype = next(iter(ZOO.values()))
    with pytest.raises(NatlibError, match="rules natpp, natpp"):
        RewriteConfig(SUPERNET, supernet.key, both, "one", genotype, MACRO, samples=2, seed=0)


def test_gains_are_measured_on_the_same_held_out_architectures(supernet: Record) -> None:
    config = gain_config(supernet)
    record = RunStore.default().run("gain", config, measure_gain, recipe=1, data="")
    assert set(record.result) == {"input", "natpp", "natpp argmax", "natpp random", "nat random"}
    draw = stream(0, "held out")
    inputs = [SpaceConfig((2,)).sample(draw) for _ in range(4)]
    network, report = load_supernet(SUPERNET, supernet.key), splits(DATA).report
    x, labels = report.normalised[:30], report.labels[:30]
    assert record.result["input"] == {
        "accuracy": [accuracy(network, x, labels, g) for g in inputs],
        "params": [network_cost(g, MACRO).params for g in inputs],
        "madds": [network_cost(g, MACRO).madds for g in inputs],
    }
    argmax = load_policy(*config.policies[0]).most_likely(inputs)
    measured = record.result["natpp argmax"]["accuracy"]
    assert measured == [accuracy(network, x, labels, g) for g in argmax]
    assert all(len(v) == 4 for m in record.result.values() for v in m.values())


def test_gains_of_each_seed_are_measured_on_images_of_its_own(supernet: Record) -> None:
    config = replace(gain_config(supernet), images=10, seed=2)
    result = RunStore.default().run("gain", config, measure_gain, recipe=1, data="").result
    draw = stream(2, "held out")
    inputs = [SpaceConfig((2,)).sample(draw) for _ in range(4)]
    network, report = load_supernet(SUPERNET, supernet.key), splits(DATA).report
    x, labels = report.normalised[20:30], report.labels[20:30]
    assert result["input"]["accuracy"] == [accuracy(network, x, labels, g) for g in inputs]


def test_gain_stopped_and_resumed_equals_uninterrupted(
    supernet: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = gain_config(supernet)
    monkeypatch.setattr(search, "GROUP", 2)
    resumed_equals_uninterrupted(tmp_path / "g", "gain", config, measure_gain, (3, 4))


def test_gain_sees_report_images_only(
    supernet: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clean = gain_config(supernet), splits(DATA)
    one = run(tmp_path / "a", "gain", config, measure_gain)
    for name, parts in (("b", ("train", "search", "test")), ("c", ("report",))):
        ruined = spoilt(clean, *parts)
        monkeypatch.setattr(search, "splits", lambda config, r=ruined: r)
        other = run(tmp_path / name, "gain", config, measure_gain)
        assert (other.result == one.result) == (name == "b")


def test_deriving_selects_on_search_images_and_reports_on_others(
    supernet: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tuple((f"g{i}", g) for i, g in enumerate(random_genotypes(3, seed=3, nodes=(2,))))
    policies = (trained_policy(supernet), trained_policy(supernet, transitions="nat"))
    config = DeriveConfig(SUPERNET, supernet.key, policies, named, samples=8, seed=0)
    clean = splits(DATA)
    one = run(tmp_path / "a", "derive", config, derive_many).result
    assert set(one) == {"g0", "g1", "g2"}
    network = load_supernet(SUPERNET, supernet.key)
    for name, genotype in named:
        assert set(one[name]) == {"natpp", "nat"}
        for found in one[name].values():
            after = Genotype.from_json(found["genotype"])
            assert found["changed"] == (after != genotype)
            for key, g in (("before_", genotype), ("", after)):
                cost = network_cost(g, MACRO)
                assert (found[f"{key}params"], found[f"{key}madds"]) == (cost.params, cost.madds)
                report = clean.report
                measured = accuracy(network, report.normalised, report.labels, g)
                assert found[f"{key}accuracy"] == measured
            score = [
                accuracy(network, clean.search.normalised, clean.search.labels, g)
                for g in (after, genotype)
            ]
            assert score[0] >= score[1]
    ruined = spoilt(clean, "train", "report", "test")
    monkeypatch.setattr(search, "splits", lambda config: ruined)
    two = run(tmp_path / "b", "derive", config, derive_many).result
    for name, _ in named:
        for rule in ("natpp", "nat"):
            assert two[name][rule]["genotype"] == one[name][rule]["genotype"]
    assert two != one


def test_scores_are_accuracies_on_all_report_images(supernet: Record) -> None:
    chosen = tuple(random_genotypes(3, nodes=(2,)))
    config = ScoreConfig(SUPERNET, supernet.key, chosen)
    record = RunStore.default().run("score", config, score_genotypes, recipe=1, data="")
    network, report = load_supernet(SUPERNET, supernet.key), splits(DATA).report
    expected = [accuracy(network, report.normalised, report.labels, g) for g in chosen]
    assert record.result == {"accuracy": expected}


SETTING = Setting(
    dataset="made",
    seeds=(0, 1),
    images={"image_size": 8, "train": 48, "search": 40, "report": 36, "test": 32},
    macro={"channels": 4, "cells": 3},
    space={"nodes": [2]},
    supernet={"epochs": 1, "batch": 16, "watched": 2},
    workers=1,
)


@pytest.mark.usefixtures("made_images")
def test_a_setting_computes_each_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[str] = []
    compute = RunStore._compute

    def counting(self: RunStore, job: Any) -> Record:
        bodies.append(job.kind)
        return compute(self, job)

    monkeypatch.setattr(RunStore, "_compute", counting)
    small = {"embedding": 8, "feature": 16, "hidden": 8}
    policy = {"updates": 2, "reward_images": 20, "gcn": small}

    def everything() -> list[list[str]]:
        policies = SETTING.policies(["nat", "natpp"], policy)
        inputs = random_genotypes(2, nodes=(2,))
        named = {f"g{i}": g for i, g in enumerate(inputs)}
        trained = SETTING.trained(inputs, [0, 1], {"epochs": 1, "batch": 16})
        assert [len(t) for t in trained] == [2, 2]
        return [
            [r.key for r in records]
            for records in (
                [r for _, r in SETTING.supernets()],
                [r for _, r in policies],
                SETTING.gains(policies, ["natpp"], genotypes=2, images=20),
                SETTING.scores(inputs),
                SETTING.derived(policies, named, samples=2),
                [r for t in trained for r in t],
            )
        ]

    first = everything()
    assert [len(keys) for keys in first] == [2, 4, 2, 2, 2, 4]
    assert all(len(set(keys)) == len(keys) for keys in first)
    expected = {"supernet": 2, "policy": 4, "gain": 2, "score": 2, "derive": 2, "train": 4}
    assert Counter(bodies) == expected
    assert everything() == first
    assert Counter(bodies) == expected


@pytest.mark.usefixtures("made_images")
def test_policies_meet_the_supernet_of_their_own_seed() -> None:
    policies = SETTING.policies(["nat"], {"updates": 1, "reward_images": 20})
    supernets = SETTING.supernets()
    assert [(c.supernet, c.supernet_key, c.seed) for c, _ in policies] == [
        (config, record.key, config.seed) for config, record in supernets
    ]


@pytest.mark.usefixtures("made_images")
@pytest.mark.parametrize(
    ("part", "bad"),
    [
        ("images", {"image_sise": 8}),
        ("space", {"node": [4]}),
        ("supernet", {"epoch": 3}),
    ],
)
def test_mistyped_settings_are_named_with_what_is_allowed(part: str, bad: dict[str, Any]) -> None:
    setting = replace(SETTING, **{part: {**getattr(SETTING, part), **bad}})
    with pytest.raises(NatlibError) as error:
        setting.supernet_configs()
    name = next(iter(bad))
    assert repr(name) in str(error.value)
    assert {"images": "image_size", "space": "nodes", "supernet": "epochs"}[part] in str(
        error.value
    )


@pytest.mark.usefixtures("made_images")
def test_settings_that_lack_something() -> None:
    with pytest.raises(NatlibError, match="'epochs'"):
        replace(SETTING, supernet={}).supernet_configs()
    with pytest.raises(NatlibError, match="unknown setting 'rate' of PolicyConfig"):
        SETTING.policies(["nat"], {"updates": 1, "rate": 0.1})
    with pytest.raises(NatlibError, match="unknown setting 'width' of GCNConfig"):
        SETTING.policies(["nat"], {"updates": 1, "gcn": {"width": 3}})
    with pytest.raises(NatlibError, match="unknown setting 'feature' of LSTMConfig"):
        SETTING.policies(["nat"], {"updates": 1, "lstm": {"feature": 3}})
    with pytest.raises(NatlibError, match="one of 'gcn', 'lstm'"):
        SETTING.policies(["nat"], {"updates": 1, "gcn": {}, "lstm": {}})
    with pytest.raises(NatlibError, match=r"macro must have channels and cells, not .*stem"):
        replace(SETTING, macro={**SETTING.macro, "stem": 1}).supernet_configs()


@pytest.mark.usefixtures("made_images")
@pytest.mark.parametrize(
    ("part", "name", "value", "wanted"),
    [
        ("supernet", "lr", "1e-3", "float .*write 0.001"),
        ("supernet", "epochs", 2.5, "int"),
        ("supernet", "batch", True, "int"),
        ("images", "train", "960", "int"),
        ("space", "nodes", [4, "5"], "tuple"),
    ],
)
def test_settings_of_another_type_are_refused(
    part: str, name: str, value: Any, wanted: str
) -> None:
    setting = replace(SETTING, **{part: {**getattr(SETTING, part), name: value}})
    with pytest.raises(NatlibError, match=f"{name} = .* must be {wanted}"):
        setting.supernet_configs()


@pytest.mark.parametrize(
    ("space", "degree", "message"),
    [
        ({"nodes": (3,)}, 2, "has 4 nodes; supernets of these settings have 3"),
        ({"primitives": ("null", "conv_3x3")}, 2, "primitive '.*' in the normal cell is not in"),
        ({}, 1, "a node of the normal cell has 2 incoming edges; policies of these settings"),
    ],
)
def test_what_supernet_or_policy_lack_is_refused_before_they_are_trained(
    space: dict[str, Any], degree: int, message: str
) -> None:
    require_rewritable(ZOO["DARTS"], SpaceConfig(), 2)
    with pytest.raises(NatlibError, match=message):
        require_rewritable(ZOO["DARTS"], SpaceConfig(**space), degree)
