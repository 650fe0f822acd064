from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natlib import NatlibError, natbench, records, tabular, truth
from natlib.policy import (
    CellBatch,
    GCNConfig,
    LSTMConfig,
    Rollout,
    UniformLogits,
    bm_log_softmax,
    draw,
)
from natlib.search import policy_step
from natlib.train import stream
from natlib.transitions import by_name
from natlib.truth import Learner, TablePolicy, TruthConfig
from tests.made import resumed_equals_uninterrupted
from tests.strategies import generator
from tests.tables import natbench_table, small_space

SMALL = small_space()
EVERYTHING = np.arange(SMALL.size)
GCN = GCNConfig(embedding=8, feature=8, hidden=8)
LEARNER = Learner(network=GCN, updates=2, architectures=3, rollouts=2)
maskings = st.sampled_from(truth.MASKINGS)


def policy(masking: str = "BMSoftmax", space: tabular.Space = SMALL, seed: int = 0) -> TablePolicy:
    return truth.untrained(replace(LEARNER, masking=masking), space, seed)


# --- policies ------------------------------------------------------------------------------------


def test_one_choice_an_edge_is_encoded_as_the_normal_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natbench, "load", natbench_table)
    space = tabular.from_natbench()
    codes = torch.tensor([3, 500, 2196])
    genotypes = [natbench.genotype(int(c)) for c in codes]
    both = CellBatch.encode(genotypes, space.primitives)
    one = policy(space=space).encode(torch.from_numpy(space.digits(codes.numpy())))
    for name in ("primitives", "sources", "present", "reduction"):
        expected = getattr(both, name)[::2]
        found = getattr(one, name)
        if name == "primitives":  # padding may hold anything
            expected, found = expected * both.present[::2], found * one.present
        assert torch.equal(found, expected), name


@settings(max_examples=25)
@given(maskings, st.integers(0, 2**31), st.sampled_from(["nat", "natpp", "natpp_cost_safe"]))
def test_nothing_forbidden_is_ever_drawn(masking: str, seed: int, rule: str) -> None:
    one = truth.untrained(replace(LEARNER, masking=masking, transitions=rule), SMALL, seed)
    drawn = one.draw(EVERYTHING, 5, generator(seed))
    likely = one.most_likely(EVERYTHING)
    allowed = SMALL.allowed(by_name(rule, SMALL.primitives))
    edges = np.arange(3)
    for found in (*drawn.T, likely):
        assert allowed[edges, SMALL.digits(EVERYTHING), SMALL.digits(found)].all()


def test_rejection_draws_as_bm_softmax_does_but_its_gradient_knows_no_mask() -> None:
    codes = EVERYTHING[:40]
    draws = [policy(m).draw(codes, 300, generator(1)) for m in ("BMSoftmax", "rejection")]
    assert (draws[0] == draws[1]).all()
    gradients = {}
    for masking in ("BMSoftmax", "rejection", "after sampling"):
        one = policy(masking)
        logits = torch.zeros(len(codes), 3, 4, requires_grad=True)
        digits = torch.from_numpy(SMALL.digits(codes))
        logp = bm_log_softmax(logits, one.known[one.edges, digits])
        logp.gather(-1, digits[..., None]).sum().backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        gradients[masking] = logits.grad[~one.mask[one.edges, digits]]
    assert (gradients["BMSoftmax"] == 0).all()
    assert (gradients["rejection"] != 0).all()
    assert (gradients["after sampling"] != 0).all()


@given(st.integers(0, 2**31))
def test_draws_follow_the_probabilities(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    logits = torch.from_numpy(numbers.normal(0, 3, (2, 3, 4)).astype(np.float32))
    mask = torch.from_numpy(numbers.random((2, 3, 4)) < 0.6) | (torch.arange(4) == 1)
    logp = bm_log_softmax(logits, mask)
    actions = draw(logp, torch.rand(2, 3, 4000, generator=generator(seed)))
    counts = torch.nn.functional.one_hot(actions, 4).sum(2) / 4000
    assert torch.allclose(counts, logp.exp(), atol=0.05)
    assert (logp.gather(-1, actions) > -np.inf).all()


def test_draws_at_the_edges_of_the_unit_interval() -> None:
    # Where the uniform number is 0, or rounds up to the whole, still nothing forbidden is drawn.
    logp = torch.tensor([-np.inf, np.log(0.3), np.log(0.7), -np.inf])
    assert draw(logp, torch.tensor([0.0, 1.0])).tolist() == [1, 2]


def test_masking_after_sampling_leaves_forbidden_edges_as_they_were() -> None:
    one = TablePolicy(UniformLogits(4), SMALL, "nat", "after sampling")
    code = int(SMALL.codes(np.array([3, 3, 3])))  # null may become skip alone
    drawn = SMALL.digits(one.draw(np.array([code]), 4000, generator(0))[0])
    assert set(np.unique(drawn[:, 2])) == {2, 3}
    # Two of four targets are forbidden, and null keeps itself: three in four stay.
    assert (drawn[:, 2] == 3).mean() == pytest.approx(0.75, abs=0.03)


def test_accepted_is_how_often_an_unmasked_draw_is_allowed() -> None:
    one = TablePolicy(UniformLogits(4), SMALL, "nat", "rejection")
    allowed = SMALL.allowed(by_name("nat", SMALL.primitives))
    share = allowed[np.arange(3), SMALL.digits(EVERYTHING)].mean(-1).prod(-1).mean()
    assert one.accepted(EVERYTHING) == pytest.approx(share)


def test_an_unknown_masking_is_refused() -> None:
    with pytest.raises(NatlibError, match="masking 'x' is not one of BMSoftmax, rejection"):
        TablePolicy(UniformLogits(4), SMALL, "nat", "x")


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [GCN, LSTMConfig(embedding=8, hidden=8)])
def test_training_beats_random_on_inputs_it_never_saw(network: GCNConfig | LSTMConfig) -> None:
    # The last primitive is worth most on each edge: a policy need only find that out.
    good = replace(SMALL, validation=SMALL.digits(EVERYTHING).sum(1) / 9.0)
    held_out, training = good.split(16, generator(0))
    learner = replace(LEARNER, network=network, updates=150, architectures=16, rollouts=8, lr=0.01)
    both = truth.train([learner, replace(learner, network=None)], good, training, 0)
    (trained, looked_at), (random, none) = both
    gains = [
        (good.validation[p.draw(held_out, 20, generator(1))] - good.validation[held_out, None])
        for p in (trained, random)
    ]
    assert gains[0].mean() > gains[1].mean() + 0.1
    assert 0 < looked_at <= 1
    assert none == 0


def test_the_same_seed_trains_the_same_policy() -> None:
    _, training = SMALL.split(16, generator(0))
    one, two, other = (truth.train([LEARNER], SMALL, training, s)[0][0] for s in (0, 0, 1))
    drawn = [p.draw(EVERYTHING, 8, generator(3)) for p in (one, two, other)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_what_costs_more_than_its_input_earns_nothing() -> None:
    earned = truth.earned(SMALL, EVERYTHING[:, None], EVERYTHING)
    for before in EVERYTHING:
        for after in EVERYTHING:
            gain = SMALL.validation[after] - SMALL.validation[before]
            dearer = SMALL.params[after] > SMALL.params[before]
            assert earned[before, after] == (min(gain, 0) if dearer else gain)


VARIANTS = (
    LEARNER,
    replace(LEARNER, transitions="nat", baseline="moving"),
    replace(LEARNER, masking="rejection", entropy_weight=0.2, entropy_last=0.1),
    replace(LEARNER, masking="after sampling", baseline="released"),
)


def test_learners_are_alike_that_differ_in_rule_mask_entropy_or_baseline() -> None:
    others = [
        replace(LEARNER, updates=3),
        replace(LEARNER, network=None),
        replace(LEARNER, network=replace(GCN, graph="released")),
        replace(LEARNER, network=LSTMConfig(4, 4)),
        replace(LEARNER, lr=0.1),
    ]
    learners = [others[0], *VARIANTS, *others[1:]]
    assert truth.alike(learners) == [[0], [1, 2, 3, 4], [5], [6], [7], [8]]
    found = truth.train(learners, SMALL, EVERYTHING[20:], 0)
    for learner, (policy, _) in zip(learners, found, strict=True):
        assert policy.masking == learner.masking
        assert isinstance(policy.network, UniformLogits) == (learner.network is None)


@pytest.mark.parametrize("graph", ["both", "residual", "released"])
def test_side_by_side_learners_learn_what_each_learns_alone(graph: str) -> None:
    learners = [
        replace(one, updates=4, lr_last=1e-4, network=replace(GCN, graph=graph)) for one in VARIANTS
    ]
    together = truth.train(learners, SMALL, EVERYTHING[20:], 3)
    digits = torch.from_numpy(SMALL.digits(EVERYTHING))
    for learner, (policy, looked_at) in zip(learners, together, strict=True):
        ((alone, looked_at_alone),) = truth.train([learner], SMALL, EVERYTHING[20:], 3)
        assert torch.allclose(policy.logits(digits), alone.logits(digits), atol=1e-5)
        assert looked_at == looked_at_alone
        fresh = truth.untrained(learner, SMALL, 3).logits(digits)
        assert not torch.allclose(policy.logits(digits), fresh, atol=1e-4)


class OneByOne:
    """A policy as ``policy_step`` trains it: one code and one edge at a time."""

    def __init__(self, policy: TablePolicy, uniform: list[float]) -> None:
        self.policy, self.uniform = policy, iter(uniform)

    def sample(self, inputs: Sequence[int], _: torch.Generator, times: int) -> Rollout:
        p = self.policy
        outputs: list[int] = []
        chosen, entropy = [], []
        for code in (code for code in inputs for _ in range(times)):
            digits = SMALL.digits(np.array([code]))[0]
            logits = p.logits(torch.from_numpy(digits)[None])[0]
            after, logps, entropies = [], [], []
            for edge, digit in enumerate(digits.tolist()):
                logp = bm_log_softmax(logits[edge], p.known[edge, digit])
                source = bm_log_softmax(logits[edge], p.drawable[edge, digit]).detach().exp()
                action = int((source.cumsum(0) <= next(self.uniform) * source.sum()).sum())
                after.append(action if p.mask[edge, digit, action] else digit)
                logps.append(logp[action])
                possible = logp[logp > -np.inf]
                entropies.append(-(possible.exp() * possible).sum())
            outputs.append(int(SMALL.codes(np.array(after))))
            chosen.append(torch.stack(logps).sum())
            entropy.append(torch.stack(entropies).sum())
        return Rollout(outputs, torch.stack(chosen), torch.stack(entropy))


@pytest.mark.parametrize("learner", VARIANTS)
def test_training_is_policy_step_one_code_at_a_time(learner: Learner) -> None:
    training, seed = EVERYTHING[20:], 5
    learner = replace(learner, updates=3, lr=0.01, lr_last=0.001)
    ((ours, _),) = truth.train([learner], SMALL, training, seed)
    plain = truth.untrained(learner, SMALL, seed)
    network = plain.network
    assert isinstance(network, torch.nn.Module)
    optimizer = torch.optim.Adam(
        network.parameters(), betas=learner.betas, weight_decay=learner.weight_decay
    )
    baseline = None
    for update in range(learner.updates):
        draw = stream(seed, "update", update)
        chosen = torch.randint(len(training), (learner.architectures,), generator=draw)
        uniform = torch.rand(learner.architectures, 3, learner.rollouts, generator=draw)
        done = update / learner.updates
        optimizer.param_groups[0]["lr"] = 0.01 + (0.001 - 0.01) * done
        first = learner.entropy_weight
        last = first if learner.entropy_last is None else learner.entropy_last
        step = policy_step(
            OneByOne(plain, uniform.transpose(1, 2).flatten().tolist()), optimizer,
            training[chosen.numpy()].tolist(), learner.rollouts,
            lambda b, a: truth.earned(SMALL, np.array(b), np.array(a)).tolist(), baseline,
            first + (last - first) * done, 0.99, draw, learner.baseline,
        )  # fmt: skip
        baseline = step["baseline"]
    digits = torch.from_numpy(SMALL.digits(EVERYTHING))
    assert torch.allclose(ours.logits(digits), plain.logits(digits), atol=1e-5)


# --- judging -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_no_choice_beats_exhaustive_search_or_costs_more(seed: int) -> None:
    inputs = EVERYTHING[::3]
    drawn = TablePolicy(UniformLogits(4), SMALL, "natpp").draw(inputs, 10, generator(seed))
    best = truth.optimum(SMALL, "natpp", inputs)
    after = truth.choose(SMALL, inputs, drawn, SMALL.validation)
    assert SMALL.cheaper(after, inputs).all()
    assert (SMALL.validation[after] >= SMALL.validation[inputs]).all()
    assert (best.validation >= SMALL.validation[after]).all()
    assert (best.test >= SMALL.test[after]).all()
    assert (best.space_validation >= best.validation).all()
    assert (best.space_test >= best.test).all()


@pytest.mark.parametrize("name", truth.SEARCHES)
def test_a_search_evaluates_what_it_may(name: str) -> None:
    inputs = EVERYTHING[::5]
    found = truth.searched(name, SMALL, inputs, EVERYTHING, 6, 0)
    assert found.shape == (len(inputs), 6)
    assert set(found.ravel().tolist()) <= set(EVERYTHING.tolist())
    if name != "NAO":  # which knows no cost; judging drops what is dearer
        assert SMALL.cheaper(found, inputs[:, None]).all()
    if name == "hill climbing":
        allowed = SMALL.allowed(by_name("natpp", SMALL.primitives))
        for code, row in zip(inputs, found, strict=True):
            assert set(row.tolist()) <= set(SMALL.closure(allowed, int(code)).tolist())
            others = row[row != code]
            assert len(set(others.tolist())) == len(others)
        # With as many evaluations as there are genotypes, nothing is left to find.
        best = truth.optimum(SMALL, "natpp", inputs).validation
        whole = truth.searched(name, SMALL, inputs, EVERYTHING, SMALL.size, 0)
        assert (SMALL.validation[whole].max(1) >= best).all()


def test_what_is_chosen_does_not_depend_on_test_accuracy() -> None:
    inputs, other = EVERYTHING[::3], replace(SMALL, test=SMALL.test[::-1].copy())
    drawn = TablePolicy(UniformLogits(4), SMALL, "natpp").draw(inputs, 10, generator(0))
    chosen = [truth.choose(s, inputs, drawn, s.validation) for s in (SMALL, other)]
    assert (chosen[0] == chosen[1]).all()


def config(**changed: Any) -> TruthConfig:
    methods = (("NAT++", LEARNER), ("random", replace(LEARNER, network=None)))
    return replace(TruthConfig("small", 0, methods, truth.SEARCHES, 12, (1, 4), 4), **changed)


def test_judging_by_hand() -> None:
    inputs = np.array([0, 63])
    drawn = np.array([[1, 2, 3, 4], [63, 62, 61, 60]])
    found = truth.judge(config(), SMALL, inputs, truth.optimum(SMALL, "natpp", inputs), drawn)
    after = truth.choose(SMALL, inputs, drawn, SMALL.validation)
    gain = SMALL.validation[after] - SMALL.validation[inputs]
    assert found["gain"] == found["gains"][1] == pytest.approx(gain.mean(), abs=1e-6)
    assert found["test_gain"] == found["test_gains"][1]
    assert found["share"] == pytest.approx(found["gain"] / found["attainable"], abs=1e-5)
    assert found["regret"] == pytest.approx(found["attainable"] - found["gain"], abs=2e-6)
    assert found["single_gain"] == pytest.approx(
        (SMALL.validation[[1, 63]] - SMALL.validation[inputs]).mean(), abs=1e-6
    )
    assert sum(found["kinds"].values()) == pytest.approx(found["test_gain"], abs=1e-5)
    assert found["inflation"] >= 0
    points = truth.plane(config(), SMALL, inputs, drawn)
    assert points[0] == pytest.approx(
        [SMALL.madds[0], SMALL.test[0], SMALL.madds[after[0]], SMALL.test[after[0]]], abs=1e-4
    )


def test_chosen_must_be_among_the_samples() -> None:
    with pytest.raises(NatlibError, match="chosen = 3 is not among samples"):
        config(chosen=3)


# --- studies -------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the small made space be one that can be loaded."""
    monkeypatch.setattr(tabular, "load", lambda name: SMALL)
    monkeypatch.setattr(tabular, "checksum", lambda name: "made")
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "runs"))


def setting(**changed: Any) -> truth.Setting:
    shared = truth.Setting(
        "small", 2, 12, ("nat", "natpp"), {"updates": 1, "architectures": 2, "rollouts": 2},
        asdict(GCN), {"embedding": 4, "hidden": 4}, (0.0,), (1,), ("released",), (1, 4), 4,
    )  # fmt: skip
    return replace(shared, **changed)


def test_a_stopped_study_goes_on_as_if_never_stopped(small: None, tmp_path: Path) -> None:
    record = resumed_equals_uninterrupted(tmp_path, "truth", config(), truth.study, (1, 2))
    assert record.result.keys() == {"input", "NAT++", "random", *truth.SEARCHES}


def test_a_study_gives_each_method_a_value_a_seed(small: None) -> None:
    shared = setting()
    study = shared.study(1, "smoke")
    assert study.source.startswith("computed")
    for name, learner in shared.methods().items():
        assert len(study.values(name, "gain")) == 2
        assert len(study.values(name, "argmax_gain")) == (2 if learner.network else 0)
        assert set(study.kinds(name)) == set(tabular.KINDS)
    for one in shared.facts("smoke"):
        assert one.result["size"] == SMALL.size
        closures = [
            len(SMALL.closure(SMALL.allowed(by_name("nat", SMALL.primitives)), c))
            for c in EVERYTHING
        ]
        assert one.result["rules"]["nat"]["closure"] == pytest.approx(np.mean(closures))
        front = np.array(one.result["front"])
        assert (np.diff(front, axis=0) > 0).all()


def test_without_a_table_the_recorded_results_are_shown(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = setting()
    here = shared.study(1, "smoke")
    monkeypatch.setattr(tabular, "lacks", lambda name: "the table is not here")
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "elsewhere"))
    nothing = shared.study(1, "smoke")
    assert (nothing.records, nothing.values("NAT++", "gain")) == ([], [])
    assert nothing.source == "nothing to show yet, because the table is not here"
    monkeypatch.setattr(records, "read_reference", lambda scale, root: here.records)
    recorded = shared.study(1, "smoke")
    assert recorded.values("NAT++", "gain") == here.values("NAT++", "gain")
    assert recorded.source == "our recorded results, because the table is not here"
    assert records.RunStore.default().root == tmp_path / "elsewhere"


def test_variants_differ_in_what_they_name() -> None:
    setting = truth.Setting(
        "natbench", 1, 5, ("nat", "natpp"), {"updates": 2}, {"embedding": 8}, {"embedding": 8}
    )
    (ours,) = setting.variants({"": {}}).values()
    found = setting.variants({"a": {"baseline": "released"}, "b": {"graph": "released"}})
    assert found["a"] == replace(ours, baseline="released")
    assert isinstance(ours.network, GCNConfig)
    assert found["b"] == replace(ours, network=replace(ours.network, graph="released"))
    with pytest.raises(NatlibError, match="unknown setting 'lambda'"):
        setting.variants({"c": {"lambda": 1}})
    with pytest.raises(NatlibError, match="baseline 'mean' is not one of"):
        setting.variants({"c": {"baseline": "mean"}})
