from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from natlib import NatlibError
from natlib.genotype import INPUTS, Cell, Edge, Genotype, parse
from natlib.policy import (
    CellBatch,
    GCNConfig,
    GCNLogits,
    LSTMConfig,
    LSTMLogits,
    Policy,
    UniformLogits,
    bm_log_softmax,
    bm_softmax,
    build_logits,
    decode,
)
from natlib.primitives import PRIMITIVES
from natlib.transitions import RULES, by_name, edge_stride
from natlib.zoo import ZOO
from tests.plain_network import policy_logits
from tests.strategies import chain, generator, genotypes, random_genotypes

K = len(PRIMITIVES)
SMALL = GCNConfig(embedding=8, feature=16, hidden=12)
GRAPHS = ["both", "residual", "released"]
NETWORKS = {
    "both": GCNConfig(8, 16, 12, degree=3),
    "released": GCNConfig(8, 16, 12, degree=3, graph="released"),
    "lstm": LSTMConfig(8, 12),
}
MIXED = [*random_genotypes(3), *random_genotypes(2, nodes=(5,)), ZOO["ENAS"], ZOO["VGG"]]


def learner(rule: str = "natpp", config: GCNConfig | LSTMConfig = SMALL, seed: int = 0) -> Policy:
    logits = build_logits(K, config, generator(seed))
    with torch.no_grad():
        # Far from uniform, so that a mistake in a logit shows.
        logits.head.weight.mul_(20)
        logits.head.bias.normal_(generator=generator(seed + 1))
    return Policy(logits.double(), by_name(rule))


# --- BMSoftmax ---------------------------------------------------------------------------------

rows = st.integers(1, 20).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-1e4, 1e4), min_size=k, max_size=k),
        st.lists(st.booleans(), min_size=k, max_size=k).filter(any),
    )
)


def subset_softmax(x: Sequence[float], mask: Sequence[bool]) -> list[float]:
    top = max(v for v, m in zip(x, mask, strict=True) if m)
    weights = [math.exp(v - top) if m else 0.0 for v, m in zip(x, mask, strict=True)]
    return [w / math.fsum(weights) for w in weights]


@given(rows)
def test_bm_softmax_is_softmax_over_what_is_allowed(row: tuple[list[float], list[bool]]) -> None:
    x, mask = torch.tensor(row[0], dtype=torch.float64), torch.tensor(row[1])
    x.requires_grad_()
    p = bm_softmax(x, mask)
    torch.testing.assert_close(p.tolist(), subset_softmax(*row), rtol=1e-9, atol=1e-12)
    assert bool((p[~mask] == 0).all())
    torch.testing.assert_close(float(p.detach().sum()), 1.0)
    allowed = torch.tensor(row[0], dtype=torch.float64)[mask].requires_grad_()
    upstream = torch.randn(p.shape, generator=generator(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((p * upstream).sum(), x)
    (expected,) = torch.autograd.grad((allowed.softmax(0) * upstream[mask]).sum(), allowed)
    torch.testing.assert_close(gradient[mask], expected)
    assert bool((gradient[~mask] == 0).all())


@given(rows)
def test_gradient_of_the_logarithm_is_zero_where_forbidden(
    row: tuple[list[float], list[bool]],
) -> None:
    x, mask = torch.tensor(row[0], requires_grad=True), torch.tensor(row[1])
    logp = bm_log_softmax(x, mask)
    assert bool((logp[~mask] == -math.inf).all())
    (gradient,) = torch.autograd.grad(logp[mask].sum(), x)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[~mask] == 0).all())


@pytest.mark.parametrize("size", [1e4, 3e38])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (1, 1), (-1, -1)])
def test_large_logits_stay_finite(size: float, signs: tuple[int, int]) -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    for forbidden in (size, -size, 0.0):
        x = torch.tensor([[signs[0] * size, signs[1] * size, forbidden, forbidden],
                          [forbidden, signs[0] * size, signs[1] * size, 0.0]])  # fmt: skip
        x.requires_grad_()
        p = bm_softmax(x, mask)
        (gradient,) = torch.autograd.grad(p.square().sum(), x)
        for t in (p, gradient):
            assert bool(torch.isfinite(t).all())
            assert bool((t[~mask] == 0).all())
        torch.testing.assert_close(p.detach().sum(1), torch.ones(2))


def test_a_single_allowed_entry_is_certain() -> None:
    for value in (-3e38, -1e4, 0.0, 3e38):
        p = bm_softmax(torch.tensor([value, 3e38]), torch.tensor([True, False]))
        assert p.tolist() == [1.0, 0.0]


def test_masks_broadcast() -> None:
    x = torch.randn(4, 3, 5, generator=generator())
    mask = torch.tensor([True, False, True, True, False])
    assert torch.equal(bm_softmax(x, mask), bm_softmax(x, mask.expand(4, 3, 5)))


@pytest.mark.parametrize("function", [bm_softmax, bm_log_softmax])
def test_a_row_that_allows_nothing_is_an_error(function: object) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(NatlibError, match="allows nothing"):
        function(torch.zeros(3, 4), mask)  # type: ignore[operator]


# --- encoding ----------------------------------------------------------------------------------


def test_encoding_of_a_small_genotype() -> None:
    normal = Cell((Edge(1, 2, "conv_3x3"), Edge(0, 2, "null"), Edge(2, 3, "skip_connect")), (2, 3))
    genotype = Genotype(normal, chain("max_pool_3x3", "conv_1x1"))
    batch = CellBatch.encode([genotype], PRIMITIVES)
    at = PRIMITIVES.index
    assert len(batch) == 2
    assert batch.reduction.tolist() == [False, True]
    assert batch.present.tolist() == [[[True, True], [True, False]], [[True, True], [False] * 2]]
    assert batch.sources[batch.present].tolist() == [1, 0, 2, 0, 1]
    assert batch.primitives[batch.present].tolist() == [
        at("conv_3x3"), at("null"), at("skip_connect"), at("max_pool_3x3"), at("conv_1x1")
    ]  # fmt: skip


@given(st.lists(genotypes(PRIMITIVES, degrees=(1, 2, 3)), min_size=1, max_size=4))
def test_encoding_keeps_primitives_and_strides_and_decodes(inputs: list[Genotype]) -> None:
    batch = CellBatch.encode(inputs, PRIMITIVES)
    assert decode(inputs, batch.primitives, PRIMITIVES) == inputs
    strides = batch.strides()[batch.present].tolist()
    expected = [
        edge_stride(e.source, kind) - 1 for g in inputs for kind, c in g.cells for e in c.edges
    ]
    assert strides == expected


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(NatlibError, match="empty list"):
        CellBatch.encode([], PRIMITIVES)
    with pytest.raises(NatlibError) as error:
        CellBatch.encode([ZOO["DARTS"], ZOO["NAONet"]], PRIMITIVES)
    assert "'conv_1x3_3x1'" in str(error.value)
    assert all(name in str(error.value) for name in PRIMITIVES)


# --- rollouts ----------------------------------------------------------------------------------


def keeps_graph(before: Genotype, after: Genotype) -> bool:
    return before.with_primitives(after.primitives) == after


@settings(max_examples=30)
@given(
    st.lists(genotypes(PRIMITIVES, nodes=(4, 5)), min_size=1, max_size=5),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(["random", *NETWORKS]),
    st.integers(0, 2**32),
)
def test_rollouts_never_leave_the_mask_nor_move_an_edge(
    inputs: list[Genotype], rule: str, kind: str, seed: int
) -> None:
    if kind == "random":
        policy = Policy(UniformLogits(K), by_name(rule))
    else:
        policy = learner(rule, NETWORKS[kind], seed % 7)
    rollout = policy.sample(inputs, generator(seed))
    for outputs in (rollout.genotypes, policy.most_likely(inputs)):
        for before, after in zip(inputs, outputs, strict=True):
            assert keeps_graph(before, after)
            assert policy.transitions.violations(before, after) == []


@pytest.mark.parametrize("kind", NETWORKS)
def test_rollouts_of_one_input_are_scored_as_if_each_stood_alone(kind: str) -> None:
    policy, inputs, times = learner("natpp", NETWORKS[kind]), [*MIXED, ZOO["DARTS"]], 3
    rollout = policy.sample(inputs, generator(), times=times)
    repeated = [g for g in inputs for _ in range(times)]
    batch = policy.encode(repeated)
    logp = policy.log_probabilities(batch)
    taken = policy.encode(rollout.genotypes).primitives
    chosen = logp.gather(-1, taken[..., None])[..., 0] * batch.present
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1) * batch.present
    for found, expected in ((rollout.log_probability, chosen), (rollout.entropy, entropy)):
        torch.testing.assert_close(found, expected.view(len(repeated), -1).sum(1))
    assert len(set(rollout.genotypes[:times])) > 1


@pytest.mark.parametrize("rule", RULES)
def test_every_allowed_transition_is_drawn_and_no_other(rule: str) -> None:
    policy = Policy(UniformLogits(K), by_name(rule))
    seen: set[tuple[int, str, str]] = set()
    inputs = random_genotypes(300)
    draw = generator()
    for _ in range(10):
        for before, after in zip(inputs, policy.sample(inputs, draw).genotypes, strict=True):
            for (kind, a), (_, b) in zip(before.cells, after.cells, strict=True):
                for old, new in zip(a.edges, b.edges, strict=True):
                    seen.add((edge_stride(old.source, kind), old.primitive, new.primitive))
    allowed = {(stride, s, t) for stride in (1, 2) for s, t in policy.transitions.pairs(stride)}
    assert seen == allowed


@pytest.mark.parametrize("rule", RULES)
def test_staying_put_always_has_a_chance(rule: str) -> None:
    policy = learner(rule)
    batch = policy.encode(MIXED)
    with torch.no_grad():
        p = policy.log_probabilities(batch).exp()
    own = p.gather(-1, batch.primitives[..., None])[..., 0]
    assert bool((own[batch.present] > 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones_like(own))
    forbidden = ~policy.mask[batch.strides(), batch.primitives]
    assert bool((p[forbidden] == 0).all())


@pytest.mark.parametrize("network", NETWORKS)
def test_log_probability_and_entropy_are_sums_over_the_edges_that_exist(network: str) -> None:
    policy = learner(config=NETWORKS[network])
    rollout = policy.sample(MIXED, generator())
    logp = policy.log_probabilities(policy.encode(MIXED))
    for i, (before, after) in enumerate(zip(MIXED, rollout.genotypes, strict=True)):
        score, entropy = [], []
        for k, ((_, a), (_, b)) in enumerate(zip(before.cells, after.cells, strict=True)):
            for n, (_, chosen) in enumerate(zip(a.in_edges, b.in_edges, strict=True)):
                for d, e in enumerate(chosen):
                    row = logp[2 * i + k, n, d].tolist()
                    score.append(row[PRIMITIVES.index(e.primitive)])
                    entropy.append(-math.fsum(math.exp(v) * v for v in row if v > -math.inf))
        torch.testing.assert_close(float(rollout.log_probability[i].detach()), math.fsum(score))
        torch.testing.assert_close(float(rollout.entropy[i].detach()), math.fsum(entropy))


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_finite_even_where_the_policy_is_certain(network: str) -> None:
    policy = learner(config=NETWORKS[network])
    assert isinstance(policy.logits, GCNLogits | LSTMLogits)
    with torch.no_grad():
        policy.logits.head.bias.mul_(1e4)
    rollout = policy.sample(MIXED, generator())
    (rollout.log_probability.sum() + rollout.entropy.sum()).backward()  # type: ignore[no-untyped-call]
    for p in policy.logits.parameters():
        assert p.grad is not None
        assert bool(torch.isfinite(p.grad).all())


def test_the_most_likely_rewriting_takes_the_largest_probability_of_each_edge() -> None:
    policy = learner()
    logp = policy.log_probabilities(policy.encode(MIXED))
    for i, after in enumerate(policy.most_likely(MIXED)):
        for k, (_, cell) in enumerate(after.cells):
            for n, group in enumerate(cell.in_edges):
                for d, e in enumerate(group):
                    row = logp[2 * i + k, n, d]
                    assert row[PRIMITIVES.index(e.primitive)] == row.max()


def test_the_random_policy_gives_every_allowed_transition_the_same_chance() -> None:
    policy = Policy(UniformLogits(K), by_name("natpp_cost_safe"))
    batch = policy.encode(MIXED)
    mask = policy.mask[batch.strides(), batch.primitives]
    expected = mask / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(policy.log_probabilities(batch).exp(), expected)


def test_samples_have_the_policys_frequencies() -> None:
    policy = learner()
    genotype = Genotype(chain("conv_5x5", "sep_conv_5x5"), chain("dil_conv_5x5", "null"))
    with torch.no_grad():
        rollout = policy.sample([genotype] * 4000, generator())
        p = policy.log_probabilities(policy.encode([genotype])).exp()
    p = p[policy.encode([genotype]).present]
    count = torch.zeros(4, K, dtype=torch.float64)
    for g in rollout.genotypes:
        for i, name in enumerate(g.primitives):
            count[i, PRIMITIVES.index(name)] += 1
    # Five standard errors.
    assert bool(((count / 4000 - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all())


@pytest.mark.parametrize("network", NETWORKS)
def test_sampling_follows_its_generator_and_touches_no_other(network: str) -> None:
    state = torch.random.get_rng_state()
    policy = learner(config=NETWORKS[network])
    first, again, other = (policy.sample(MIXED, generator(s)).genotypes for s in (0, 0, 1))
    assert first == again
    assert first != other
    policy.most_likely(MIXED)
    build_logits(K, NETWORKS[network])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("config", NETWORKS.values())
def test_the_same_seed_gives_the_same_policy(config: GCNConfig | LSTMConfig) -> None:
    a, b, c = (build_logits(K, config, generator(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("config", [GCNConfig(), LSTMConfig()])
def test_an_untrained_policy_is_nearly_uniform(config: GCNConfig | LSTMConfig) -> None:
    policy = Policy(build_logits(K, config, generator()), by_name("natpp"))
    uniform = Policy(UniformLogits(K), by_name("natpp"))
    with torch.no_grad():
        entropy = policy.sample(MIXED, generator()).entropy
        most = uniform.sample(MIXED, generator()).entropy
    assert bool((entropy > 0.9 * most).all())


# --- batching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_one_by_one(rule: str, network: str) -> None:
    policy = learner(rule, NETWORKS[network])
    three = Cell((*ZOO["DARTS"].normal.edges, Edge(1, 5, "conv_5x5")), (2, 3, 4, 5))
    inputs = [*MIXED, Genotype(chain("conv_3x3", "null"), three)]
    whole = policy.log_probabilities(policy.encode(inputs))
    for i, genotype in enumerate(inputs):
        batch = policy.encode([genotype])
        alone = policy.log_probabilities(batch)
        n, d = alone.shape[1:3]
        part = whole[2 * i : 2 * i + 2, :n, :d]
        torch.testing.assert_close(part[batch.present], alone[batch.present])


@pytest.mark.parametrize("network", NETWORKS)
def test_what_fills_up_a_batch_has_no_influence(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = learner(config=NETWORKS[network])
    # A node with one edge before nodes with three: what fills up stands between edges.
    uneven = Cell((*chain("conv_3x3", "null").edges, *(Edge(i, 3, "null") for i in range(3))), (3,))
    inputs = [*MIXED, Genotype(uneven, chain("null", "skip_connect", "conv_5x5"))]
    batch = policy.encode(inputs)
    filled = CellBatch(
        torch.where(batch.present, batch.primitives, torch.tensor(PRIMITIVES.index("conv_5x5"))),
        torch.where(batch.present, batch.sources, torch.tensor(1)),
        batch.present,
        batch.reduction,
    )
    assert not torch.equal(filled.primitives, batch.primitives)
    a, b = policy.log_probabilities(batch), policy.log_probabilities(filled)
    assert torch.equal(a[batch.present], b[batch.present])
    # Filling is no graph edge, and sampling one changes no sum.
    rollouts = []
    for encoded in (batch, filled):
        monkeypatch.setattr(policy, "encode", lambda _, encoded=encoded: encoded)
        rollouts.append(policy.sample(inputs, generator()))
    one, two = rollouts
    assert one.genotypes == two.genotypes
    torch.testing.assert_close(one.log_probability, two.log_probability)
    torch.testing.assert_close(one.entropy, two.entropy)


def test_a_node_with_more_inputs_than_the_policy_was_built_for() -> None:
    three = Cell(tuple(Edge(0, 2, "null") for _ in range(3)), (2,))
    with pytest.raises(NatlibError, match="3 incoming edges; this policy was built for 2"):
        learner().sample([Genotype(three, three)], generator())


def test_unknown_graph_form() -> None:
    with pytest.raises(NatlibError, match=r"'undirected'.*'both', 'residual', 'released'"):
        GCNConfig(graph="undirected")


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("degree", [2, 3])
def test_logits_and_gradients_equal_the_literal_policy(graph: str, degree: int) -> None:
    logits = GCNLogits(K, GCNConfig(8, 16, 12, degree, graph), generator()).double()
    with torch.no_grad():
        logits.project.bias.normal_(generator=generator(1))
    # Many cells, so that nodes repeat; sizes that differ, so that there is padding.
    batch = CellBatch.encode([*MIXED, *random_genotypes(40)], PRIMITIVES)
    rows, where = logits.distinct_rows(batch)
    assert len(rows) < len(where) / 2
    weights = torch.randn(*batch.primitives.shape, K, generator=generator(2)).double()
    found = []
    for forward in (logits, lambda batch: policy_logits(logits, batch)):
        logits.zero_grad()
        z = forward(batch)
        (z * weights).sum().backward()
        found.append([z.detach(), *(p.grad for p in logits.parameters())])
    for ours, literal in zip(*found, strict=True):
        torch.testing.assert_close(ours, literal)


@pytest.mark.parametrize("network", NETWORKS)
def test_one_policy_takes_cells_with_other_numbers_of_incoming_edges(network: str) -> None:
    nasbench = parse(
        "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"
    )
    policy = learner(config=NETWORKS[network])
    found = policy.sample([nasbench, *MIXED], generator()).genotypes
    assert found[0] != nasbench
    for before, after in zip([nasbench, *MIXED], found, strict=True):
        assert policy.transitions.violations(before, after) == []


# --- what the policy sees ----------------------------------------------------------------------


OURS = GCNConfig(embedding=8, feature=32, hidden=32)
RELEASED = replace(OURS, graph="released")


def seen(config: GCNConfig | LSTMConfig, cells: Sequence[Cell]) -> list[list[list[bool]]]:
    """For each cell: does edge i's primitive move edge j's logits? Found by changing it."""
    logits = build_logits(K, config, generator()).double()
    found = []
    for cell in cells:
        size = len(cell.edges)
        changed = [cell]
        for i, e in enumerate(cell.edges):
            names = [x.primitive for x in cell.edges]
            names[i] = "conv_5x5" if e.primitive != "conv_5x5" else "null"
            changed.append(cell.with_primitives(names))
        batch = CellBatch.encode([Genotype(c, c) for c in changed], PRIMITIVES)
        with torch.no_grad():
            z = logits(batch)[::2][:, batch.present[0]]
        moved = (z[1:] - z[0]).abs().amax(-1) > 1e-12
        assert moved.shape == (size, size)
        found.append(moved.tolist())
    return found


def depends(moved: list[list[bool]]) -> list[bool]:
    return [any(row[j] for row in moved) for j in range(len(moved))]


def test_our_policy_sees_every_edges_own_primitive_and_its_neighbours() -> None:
    cells = [c for g in random_genotypes(20) for _, c in g.cells]
    cells += [c for n in ("DARTS", "VGG", "R1") for _, c in ZOO[n].cells]
    for cell, moved in zip(cells, seen(OURS, cells), strict=True):
        assert all(moved[i][i] for i in range(len(cell.edges)))
        for i, a in enumerate(cell.edges):
            for j, b in enumerate(cell.edges):
                if b.source == a.target:
                    assert moved[i][j]  # what flows into an edge's source
                if a.source == b.target:
                    assert moved[i][j]  # and what is made of its target


def test_the_released_policy_never_sees_an_edges_own_primitive() -> None:
    cells = [c for g in random_genotypes(100) for _, c in g.cells]
    blind = total = 0
    for cell, moved in zip(cells, seen(RELEASED, cells), strict=True):
        assert not any(moved[i][i] for i in range(len(cell.edges)))
        for j, b in enumerate(cell.edges):
            # Two steps against the arrows: only what enters the sources of an edge's siblings'
            # sources can be seen.
            middle = {e.source for e in cell.edges if e.target == b.target}
            first = {e.source for e in cell.edges if e.target in middle}
            for i, a in enumerate(cell.edges):
                assert moved[i][j] == (a.target in first)
        blind += depends(moved).count(False)
        total += len(cell.edges)
    # "in 200 random cells 83 % of edges have logits that depend on no primitive at all"
    assert len(cells) == 200
    assert 0.78 < blind / total < 0.88


def test_the_released_policy_sees_nothing_of_darts() -> None:
    cells = [ZOO["DARTS"].normal, ZOO["DARTS"].reduce]
    for moved in seen(RELEASED, cells):
        assert not any(depends(moved))
    for moved in seen(OURS, cells):
        assert all(depends(moved))


def test_the_lstm_sees_the_whole_cell_from_every_edge() -> None:
    for genotype in (*random_genotypes(5), *random_genotypes(2, nodes=(9,))):
        for moved in seen(LSTMConfig(8, 12), [genotype.normal, genotype.reduce]):
            assert all(all(row) for row in moved)


def test_the_lstm_tells_every_node_from_the_others() -> None:
    # Five nodes as in ENAS, and a row of twenty: it was built for no number of nodes.
    for nodes in (5, 20):
        last = INPUTS + nodes - 1
        rest = tuple(Edge(0, t, "conv_3x3") for t in range(INPUTS, last))
        cells = [Cell((*rest, Edge(s, last, "conv_3x3")), (last,)) for s in range(last)]
        logits = LSTMLogits(K, LSTMConfig(8, 12), generator()).double()
        with torch.no_grad():
            z = logits(CellBatch.encode([Genotype(c, c) for c in cells], PRIMITIVES))[::2, -1, 0]
        assert float(torch.pdist(z).min()) > 1e-6


@pytest.mark.parametrize("config", [SMALL, LSTMConfig(8, 12)])
def test_the_policy_knows_the_cells_type_and_each_inputs_place(
    config: GCNConfig | LSTMConfig,
) -> None:
    def rows(cell: Cell) -> Tensor:
        logits = build_logits(K, config, generator()).double()
        with torch.no_grad():
            return logits(CellBatch.encode([Genotype(cell, cell)], PRIMITIVES))

    z = rows(chain("conv_3x3", "conv_3x3", "conv_3x3"))
    assert (z[0] - z[1]).abs().max() > 1e-6  # normal and reduction
    assert (z[0, 0, 0] - z[0, 0, 1]).abs().max() > 1e-6  # first and second incoming edge
    other = rows(Cell((Edge(1, 2, "conv_3x3"), Edge(1, 2, "conv_3x3")), (2,)))
    same = rows(Cell((Edge(0, 2, "conv_3x3"), Edge(0, 2, "conv_3x3")), (2,)))
    assert (other - same).abs().max() > 1e-6  # input 0 and input 1


def test_the_adjacency_of_each_form() -> None:
    cell = Cell((Edge(0, 2, "null"), Edge(0, 2, "null"), Edge(2, 3, "null")), (3,))
    batch = CellBatch.encode([Genotype(cell, cell)], PRIMITIVES)
    released = GCNLogits(K, GCNConfig(8, 16, 12, graph="released")).adjacency(batch)[0]
    # Two edges between the same nodes weigh double, as in the authors' code.
    expected = torch.zeros(4, 4)
    expected[2, 0], expected[3, 2] = 2, 1
    assert torch.equal(released, expected)
    both = GCNLogits(K, SMALL).adjacency(batch)[0]
    linked = torch.eye(4)
    for i, j in ((0, 2), (2, 3)):
        linked[i, j] = linked[j, i] = 1
    degree = linked.sum(1)
    torch.testing.assert_close(both, linked / (degree[:, None] * degree[None]).sqrt())
    assert math.isclose(float(both[1, 1]), 1.0)
    assert both.shape == (2 + INPUTS, 2 + INPUTS)
    residual = GCNLogits(K, replace(SMALL, graph="residual")).adjacency(batch)[0]
    torch.testing.assert_close(residual, both + torch.eye(4))


def test_only_the_residual_form_tells_nodes_apart_where_all_are_linked() -> None:
    # As in natbench: slot 0 of node 2 and of node 3 are different edges of the same mean.
    cell = Cell((Edge(1, 2, "conv_3x3"), Edge(1, 3, "null"), Edge(2, 3, "skip_connect")), (3,))
    batch = CellBatch.encode([Genotype(cell, cell)], PRIMITIVES)
    apart = {}
    for graph in ("both", "residual"):
        logits = GCNLogits(K, replace(SMALL, graph=graph), generator(0))(batch)
        apart[graph] = float((logits[:, 0, 0] - logits[:, 1, 0]).detach().abs().max())
    assert apart["both"] < 1e-6 < 1e-4 < apart["residual"]
