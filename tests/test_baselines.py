from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natlib import NatlibError, natbench
from natlib.baselines import (
    EXHAUSTIVE_LIMIT,
    NAO,
    Closure,
    Evaluate,
    Found,
    NAOConfig,
    closure,
    exhaustive,
    hill_climbing,
    nao,
    random_search,
    reachable,
)
from natlib.cost import network_cost
from natlib.genotype import Genotype
from natlib.macro import MacroConfig
from natlib.primitives import PRIMITIVES
from natlib.transitions import RULES, Transitions, by_name, edge_stride, free
from natlib.zoo import ZOO
from tests.strategies import chain, generator, genotypes, random_genotypes

Search = Callable[[Closure, Evaluate, int, torch.Generator], Found]
SEARCHES: dict[str, Search] = {
    "random": random_search,
    "first improvement": hill_climbing,
    "batches": partial(hill_climbing, batch=5),
    "steepest ascent": partial(hill_climbing, batch=1000),
    "nao": partial(nao, config=NAOConfig(8, 8, 8, updates=3, rounds=2, seeds=3)),
}
SPACES = {**RULES, "free": free}
small = genotypes(nodes=(1, 2), degrees=(1, 2))
natbench_inputs = st.integers(0, natbench.SIZE - 1).map(natbench.genotype)


class Additive:
    """A reward that adds a drawn term for each edge and primitive, mapped into 0..1.

    It counts the genotypes it was asked for, and refuses to be asked twice.
    """

    def __init__(self, seed: int) -> None:
        self.terms = torch.rand(64, len(PRIMITIVES), generator=generator(seed)).tolist()
        self.seen: dict[Genotype, None] = {}

    def value(self, genotype: Genotype) -> float:
        names = genotype.primitives
        terms = [self.terms[i][PRIMITIVES.index(n)] for i, n in enumerate(names)]
        return math.fsum(terms) / len(terms)

    def __call__(self, genotypes: Sequence[Genotype]) -> list[float]:
        asked = dict.fromkeys(genotypes)
        assert len(asked) == len(genotypes)
        assert not asked.keys() & self.seen.keys()
        self.seen |= asked
        return [self.value(g) for g in genotypes]

    def optimum(self, space: Closure) -> float:
        """The best value of a closure whose choices are single edges or tied pairs of them."""
        total = 0.0
        for group, options in zip(space.groups, space.options, strict=True):
            at = [PRIMITIVES.index(o) for o in options]
            total += max(sum(self.terms[e][k] for e in group) for k in at)
        return total / len(space.genotype.primitives)


class Rugged(Additive):
    """A reward without structure: a number for each genotype, with many local optima."""

    def value(self, genotype: Genotype) -> float:
        return crc32(repr((genotype.primitives, self.terms[0][0])).encode()) / 2**32


# --- the closure -------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("rule", SPACES)
def test_one_transition_reaches_what_many_do(rule: str, strides: tuple[int, ...]) -> None:
    transitions = SPACES[rule]()
    for source in PRIMITIVES:
        once = [t for t in PRIMITIVES if all(transitions.allows(source, t, s) for s in strides)]
        found = reachable(transitions, source, strides)
        assert found[0] == source
        assert sorted(found) == sorted(once)


def test_a_rule_that_is_not_transitive_reaches_further_in_several_steps() -> None:
    names = ("conv_5x5", "conv_3x3", "conv_1x1", "null")
    step = Transitions(
        "step", names, lambda s, t, stride: names.index(t.name) - names.index(s.name) in (0, 1)
    )
    assert not step.allows("conv_5x5", "null")
    assert reachable(step, "conv_5x5", (1, 2)) == names
    assert reachable(step, "conv_1x1", (1,)) == ("conv_1x1", "null")


def test_a_step_must_be_allowed_at_all_strides() -> None:
    rule = by_name("natpp_cost_safe")
    assert "skip_connect" in reachable(rule, "null", (1,))
    assert "skip_connect" not in reachable(rule, "null", (2,))
    assert "skip_connect" not in reachable(rule, "null", (1, 2))


@given(genotypes(nodes=(1, 2, 4, 5), degrees=(1, 2, 3)), st.sampled_from(sorted(RULES)))
def test_the_closure_is_what_the_rule_allows_on_every_edge(genotype: Genotype, rule: str) -> None:
    space = closure(genotype, by_name(rule))
    strides = [edge_stride(e.source, k) for k, c in genotype.cells for e in c.edges]
    assert space.build((0,) * len(space.options)) == genotype
    for names, own, stride in zip(space.options, genotype.primitives, strides, strict=True):
        assert set(names) == {t for s, t in by_name(rule).pairs(stride) if s == own}
    for code in space.draw(5, generator()):
        after = space.build(code)
        assert by_name(rule).violations(genotype, after) == []
        assert genotype.with_primitives(after.primitives) == after


@given(natbench_inputs, st.sampled_from(sorted(SPACES)))
def test_tied_cells_stay_tied(genotype: Genotype, rule: str) -> None:
    space = closure(genotype, SPACES[rule](), tied=True)
    members = [space.build(code) for code in space.codes()]
    assert len(set(members)) == len(members) == space.size
    for member in members:
        natbench.index(member)
        assert SPACES[rule]().violations(genotype, member) == []
    legal = [
        g for g in map(natbench.genotype, range(0, natbench.SIZE, 7))
        if not SPACES[rule]().violations(genotype, g)
    ]  # fmt: skip
    assert set(legal) <= set(members)


def test_neighbours_differ_in_one_choice() -> None:
    space = closure(natbench.genotype(("conv_3x3", "conv_5x5", "null")), free(), tied=True)
    found = space.neighbours((1, 0, 2), generator())
    assert len(set(found)) == len(found) == 36
    assert all(sum(a != b for a, b in zip(c, (1, 0, 2), strict=True)) == 1 for c in found)
    assert found != space.neighbours((1, 0, 2), generator(1))


def test_closures_that_make_no_sense() -> None:
    genotype = Genotype(chain("conv_3x3", "null"), chain("conv_3x3", "conv_3x3"))
    with pytest.raises(NatlibError, match="cell differ"):
        closure(genotype, free(), tied=True)
    with pytest.raises(NatlibError, match="'null' is not in this search space"):
        closure(genotype, free(("conv_3x3",)))
    own = tuple((n,) for n in genotype.primitives)
    with pytest.raises(NatlibError, match=r"edges 0\.\.3 once"):
        Closure(genotype, ((0,), (1,), (2,), (2,)), own)
    with pytest.raises(NatlibError, match="3 sets of options for 4 choices"):
        Closure(genotype, ((0,), (1,), (2,), (3,)), own[:3])
    with pytest.raises(NatlibError, match=r"edges \(1,\) carry null"):
        Closure(genotype, ((0,), (1,), (2,), (3,)), (own[0], own[0], *own[2:]))


# --- every search ------------------------------------------------------------------------------


def check(found: Found, space: Closure, reward: Additive, budget: int) -> None:
    """What holds of all searches."""
    evaluated = [g for g, _ in found.trajectory]
    assert evaluated == list(reward.seen)
    assert evaluated[0] == space.genotype
    assert len(evaluated) <= min(budget, space.size)
    assert [v for _, v in found.trajectory] == [reward.value(g) for g in evaluated]
    for g in evaluated:
        assert space.genotype.with_primitives(g.primitives) == g
        for group, options in zip(space.groups, space.options, strict=True):
            assert len({g.primitives[e] for e in group} & set(options)) == 1
            assert len({g.primitives[e] for e in group}) == 1
    assert found.value == max(v for _, v in found.trajectory) == reward.value(found.genotype)
    values = [v for _, v in found.trajectory]
    assert found.best_so_far == [max(values[: i + 1]) for i in range(len(values))]
    assert found.best_so_far[0] == reward.value(space.genotype)


@settings(max_examples=40)
@given(
    small,
    st.sampled_from(sorted(SPACES)),
    st.sampled_from(sorted(SEARCHES)),
    st.integers(1, 60),
    st.integers(0, 2**32),
    st.sampled_from([Additive, Rugged]),
)
def test_a_search_spends_its_budget_inside_the_closure(
    genotype: Genotype,
    rule: str,
    search: str,
    budget: int,
    seed: int,
    kind: type[Additive],
) -> None:
    space = closure(genotype, SPACES[rule]())
    reward = kind(seed)
    found = SEARCHES[search](space, reward, budget, generator(seed))
    check(found, space, reward, budget)
    # All of it, where there is enough to look at.
    assert len(found.trajectory) == min(budget, space.size)
    again = SEARCHES[search](space, kind(seed), budget, generator(seed))
    assert again == found


@settings(max_examples=20)
@given(natbench_inputs, st.sampled_from(sorted(RULES)), st.integers(0, 2**32))
def test_no_search_beats_the_exhaustive_one_and_with_budget_enough_all_equal_it(
    genotype: Genotype, rule: str, seed: int
) -> None:
    space = closure(genotype, by_name(rule), tied=True)
    reward = Rugged(seed)
    best = exhaustive(space, reward)
    check(best, space, reward, space.size)
    assert len(best.trajectory) == space.size
    for search in SEARCHES.values():
        assert search(space, Rugged(seed), 8, generator(seed)).value <= best.value
        assert search(space, Rugged(seed), space.size, generator(seed)).value == best.value


def test_genotypes_over_the_cost_limit_are_not_evaluated_nor_charged() -> None:
    macro = MacroConfig(channels=8, cells=3, classes=10, image_size=8)
    genotype = natbench.genotype(("max_pool_3x3", "sep_conv_3x3", "skip_connect"))
    limit = network_cost(genotype, macro)
    space = closure(
        genotype, free(), tied=True, within=lambda g: network_cost(g, macro).within(limit)
    )
    cheap = [g for g in map(natbench.genotype, range(natbench.SIZE)) if space.within(g)]
    assert 20 < len(cheap) < natbench.SIZE / 2
    for search in SEARCHES.values():
        for budget in (20, natbench.SIZE):
            found = search(space, Rugged(0), budget, generator())
            assert len(found.trajectory) == min(budget, len(cheap))
            assert {g for g, _ in found.trajectory} <= set(cheap)
    assert {g for g, _ in exhaustive(space, Rugged(0)).trajectory} == set(cheap)


def test_a_search_draws_from_its_generator_alone() -> None:
    space = closure(ZOO["DARTS"], free())
    state = torch.random.get_rng_state()
    for search in SEARCHES.values():
        one, two = (search(space, Rugged(0), 30, generator(seed)) for seed in (0, 1))
        assert one != two
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("rule", SPACES)
def test_large_closures_cost_no_more_than_the_budget(search: str, rule: str) -> None:
    for genotype in random_genotypes(3):
        space = closure(genotype, SPACES[rule]())
        reward = Additive(0)
        found = SEARCHES[search](space, reward, 200, generator())
        check(found, space, reward, 200)
        assert len(found.trajectory) == 200


def test_what_searches_refuse() -> None:
    space = closure(ZOO["DARTS"], free())
    for search in SEARCHES.values():
        with pytest.raises(NatlibError, match="budget = 0"):
            search(space, Additive(0), 0, generator())
    with pytest.raises(NatlibError, match="batch = 0"):
        hill_climbing(space, Additive(0), 3, generator(), batch=0)
    with pytest.raises(NatlibError, match=rf"{13**16} genotypes.*{EXHAUSTIVE_LIMIT}"):
        exhaustive(space, Additive(0))
    for wrong in ([0.1, 0.2], [], [math.nan]):
        with pytest.raises(NatlibError, match="one finite value for each of 1 genotypes"):
            random_search(space, lambda genotypes, v=wrong: v, 3, generator())  # type: ignore[misc]


# --- hill climbing -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5, 1000])
@pytest.mark.parametrize("rule", SPACES)
def test_hill_climbing_finds_the_optimum_where_edges_add_up(rule: str, batch: int) -> None:
    for seed, genotype in enumerate([ZOO["DARTS"], ZOO["ENAS"], *random_genotypes(3)]):
        space = closure(genotype, SPACES[rule]())
        found = hill_climbing(space, Additive(seed), 6000, generator(seed), batch)
        assert math.isclose(found.value, Additive(seed).optimum(space))


@settings(max_examples=25)
@given(natbench_inputs, st.integers(0, 2**32))
def test_hill_climbing_only_ever_looks_around_its_best_until_that_is_a_top(
    genotype: Genotype, seed: int
) -> None:
    space = closure(genotype, free(), tied=True)
    found = hill_climbing(space, Rugged(seed), 300, generator(seed))
    here, value, looked = space.genotype, found.trajectory[0][1], 0
    for g, v in found.trajectory[1:]:
        if looked == 36:
            break
        changed = sum(a != b for a, b in zip(here.normal.edges, g.normal.edges, strict=True))
        assert changed == 1
        looked += 1
        if v > value:
            # Up, and to the neighbours of the new place that are not known yet.
            here, value, looked = g, v, 0
            known = [h for h, _ in found.trajectory[: found.trajectory.index((g, v)) + 1]]
            looked = sum(
                sum(a != b for a, b in zip(g.normal.edges, h.normal.edges, strict=True)) == 1
                for h in known
            )
    assert looked == 36


def test_hill_climbing_needs_fewer_evaluations_than_random_search_where_edges_add_up() -> None:
    wins = 0
    for seed, genotype in enumerate(random_genotypes(20)):
        space = closure(genotype, free())
        climbed = hill_climbing(space, Additive(seed), 100, generator(seed)).value
        wins += climbed > random_search(space, Additive(seed), 100, generator(seed)).value
    assert wins == 20


# --- NAO ---------------------------------------------------------------------------------------

K = len(PRIMITIVES)
ANY = torch.ones(3, K, dtype=torch.bool)


def natbench_tokens(count: int, seed: int) -> torch.Tensor:
    numbers = torch.randperm(natbench.SIZE, generator=generator(seed))[:count].tolist()
    return torch.tensor([[PRIMITIVES.index(p) for p in natbench.primitives(i)] for i in numbers])


def accuracies(tokens: torch.Tensor) -> torch.Tensor:
    """An additive reward of three choices, in the range of accuracies."""
    return 0.6 + 0.1 * torch.tensor(Additive(0).terms)[torch.arange(3), tokens].mean(1)


@pytest.fixture(scope="module")
def fitted() -> NAO:
    model = NAO(K, NAOConfig(updates=150), generator())
    tokens = natbench_tokens(500, 0)[:200]
    model.fit(tokens, accuracies(tokens), generator())
    return model


@torch.no_grad()
def test_the_predictor_ranks_architectures_that_it_was_not_fitted_to(fitted: NAO) -> None:
    held_out = natbench_tokens(500, 0)[200:]
    predicted = fitted.predict(fitted.encode(held_out))
    ranks = torch.stack([predicted, accuracies(held_out)]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.85


@torch.no_grad()
def test_the_decoder_gives_back_what_was_encoded(fitted: NAO) -> None:
    seen, held_out = natbench_tokens(500, 0).split([200, 300])
    for tokens, share in ((seen, 0.9), (held_out, 0.8)):
        same = fitted.generate(fitted.encode(tokens), ANY) == tokens
        assert float(same.double().mean()) > share


@torch.no_grad()
def test_a_step_in_the_embedding_raises_predicted_and_true_performance(fitted: NAO) -> None:
    tokens = natbench_tokens(500, 0)[200:]
    start = fitted.encode(tokens)
    before = fitted.predict(start)
    moved = fitted.step(start, 0.1)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(300, 3))
    assert bool((fitted.predict(moved) > before).all())
    gains = []
    for size in (0.5, 1.0, 2.0):
        better = fitted.improve(tokens, ANY, size)
        assert bool((fitted.predict(fitted.encode(better)) - before).mean() > 0)
        gains.append(float((accuracies(better) - accuracies(tokens)).mean()))
    # In standard deviations of the architectures' accuracies.
    assert min(gains) > 0.2 * float(accuracies(tokens).std())


@torch.no_grad()
def test_decoding_keeps_to_what_is_allowed_and_to_its_own_logits(fitted: NAO) -> None:
    tokens = natbench_tokens(200, 1)
    embedding = fitted.encode(tokens)
    allowed = torch.rand(200, 3, K, generator=generator()) < 0.3
    allowed.scatter_(2, tokens[..., None], True)
    found = fitted.generate(embedding, allowed)
    assert bool(allowed.gather(2, found[..., None]).all())
    logits = fitted.decode(embedding, found).masked_fill(~allowed, -math.inf)
    assert torch.equal(logits.argmax(-1), found)
    alone = [fitted.generate(embedding[i : i + 1], allowed[i]) for i in range(20)]
    assert torch.equal(torch.cat(alone), found[:20])


@torch.no_grad()
def test_the_decoder_sees_only_earlier_tokens(fitted: NAO) -> None:
    tokens = natbench_tokens(20, 1)
    embedding = fitted.encode(tokens)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % K
    one, two = (fitted.decode(embedding, t) for t in (tokens, changed))
    assert torch.equal(one[:, :2], two[:, :2])
    assert not torch.equal(one[:, 2], two[:, 2])


def test_nao_is_saved_and_loaded_and_follows_its_generator(fitted: NAO) -> None:
    tokens = natbench_tokens(50, 1)
    state = torch.random.get_rng_state()
    loaded = NAO(K, fitted.config, generator(9))
    assert not torch.equal(loaded.improve(tokens, ANY, 1.0), fitted.improve(tokens, ANY, 1.0))
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.improve(tokens, ANY, 1.0), fitted.improve(tokens, ANY, 1.0))
    again = NAO(K, NAOConfig(updates=2), generator())
    other = NAO(K, NAOConfig(updates=2), generator())
    for model in (again, other):
        model.fit(tokens, accuracies(tokens), generator(3))
    for a, b in zip(again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_equal_accuracies_teach_nothing_and_break_nothing() -> None:
    model = NAO(K, NAOConfig(updates=5), generator())
    tokens = natbench_tokens(5, 1)
    model.fit(tokens, torch.full((5,), 0.7), generator())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_nao_beats_random_search_at_equal_numbers_of_evaluations() -> None:
    regret = {"nao": 0.0, "random": 0.0}
    for seed in range(5):
        space = closure(natbench.genotype(101 * seed), free(), tied=True)
        best = Additive(seed).optimum(space)
        regret["nao"] += best - nao(space, Additive(seed), 100, generator(seed)).value
        regret["random"] += best - random_search(space, Additive(seed), 100, generator(seed)).value
    assert regret["nao"] < 0.8 * regret["random"]


def test_what_nao_refuses() -> None:
    with pytest.raises(NatlibError, match=r"first = 1\.5"):
        NAOConfig(first=1.5)
    for name in ("rounds", "seeds", "updates", "batch"):
        with pytest.raises(NatlibError, match=f"{name} = 0"):
            NAOConfig(**{name: 0})
