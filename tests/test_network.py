from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from natlib import NatlibError
from natlib.cost import auxiliary_cost, network_cost
from natlib.genotype import INPUTS, Cell, Edge, Genotype
from natlib.macro import ImageNetMacro, MacroConfig
from natlib.network import CellNetwork, Memo, edge_keys, parameter_count
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES
from natlib.search import SpaceConfig, random_policy
from natlib.zoo import ZOO
from tests.plain_network import supernet_forward
from tests.strategies import any_genotypes, chain, generator, genotypes, random_genotypes

MACRO = MacroConfig(channels=4, cells=5, classes=3, image_size=8)
COPIED = ["DARTS", "NATv2_DARTS", "R1", "VGG", "Mobilenetv2", "ENAS", "NAT_ENAS"]


def images(count: int = 5, macro: MacroConfig = MACRO, seed: int = 0) -> Tensor:
    shape = (count, macro.image_channels, macro.image_size, macro.image_size)
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@cache
def supernet(nodes: int = 4, macro: MacroConfig = MACRO, seed: int = 0) -> CellNetwork:
    network = CellNetwork(macro, nodes=nodes, primitives=PRIMITIVES, generator=generator(seed))
    return network.double()


def standalone(genotype: Genotype, macro: MacroConfig = MACRO, **options: object) -> CellNetwork:
    return CellNetwork(macro, genotype=genotype, generator=generator(), **options).double()  # type: ignore[arg-type]


SUPERNET = supernet()


# --- against the literal oracle ----------------------------------------------------------------


def gradients(network: CellNetwork, logits: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(
        (logits * upstream).sum(), list(parameters.values()), allow_unused=True
    )
    # A weight that a pass does not touch has no gradient in one form and a zero one in the other.
    pairs = zip(parameters.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def agrees_with_the_oracle(network: CellNetwork, genotype: Genotype, x: Tensor) -> None:
    run = genotype if network.genotype is None else None
    logits, expected = network(x, run), supernet_forward(network, x, genotype)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(network(x, run), expected, rtol=1e-8, atol=1e-8)
    upstream = torch.randn(logits.shape, generator=generator(1), dtype=torch.float64)
    ours = gradients(network, logits, upstream)
    theirs = gradients(network, expected, upstream)
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", PRIMITIVES)
def test_supernet_of_one_primitive_equals_the_oracle(name: str) -> None:
    genotype = random_genotypes(1)[0]
    genotype = genotype.with_primitives([name] * len(genotype.primitives))
    agrees_with_the_oracle(SUPERNET, genotype, images())


@settings(max_examples=15)
@given(genotypes(PRIMITIVES, nodes=(4,), degrees=(1, 2, 3), concat="all"))
def test_supernet_equals_the_oracle(genotype: Genotype) -> None:
    agrees_with_the_oracle(SUPERNET, genotype, images())


@pytest.mark.parametrize("cells", [1, 2, 3, 8])
def test_supernet_of_any_depth_equals_the_oracle(cells: int) -> None:
    macro = MacroConfig(4, cells, classes=2, image_size=12, image_channels=1, stem=2)
    network = supernet(3, macro)
    for genotype in random_genotypes(2, seed=cells, nodes=(3,)):
        agrees_with_the_oracle(network, genotype, images(3, macro))


@pytest.mark.parametrize("seed", range(4))
def test_standalone_in_training_equals_the_oracle(seed: int) -> None:
    genotype = Genotype(
        *(
            Cell(tuple(dict.fromkeys(c.edges)), c.concat)  # the oracle knows no repeated edges
            for _, c in random_genotypes(1, seed=seed)[0].cells
        )
    )
    network = standalone(genotype)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.rand(p.shape, generator=generator(2)))
    agrees_with_the_oracle(network, genotype, images())


# --- what a genotype means to a network --------------------------------------------------------


@settings(max_examples=15)
@given(genotypes(PRIMITIVES, nodes=(2, 4)), st.data())
def test_what_does_not_reach_the_output_changes_nothing(
    genotype: Genotype, data: st.DataObject
) -> None:
    names = [
        e.primitive if e.target in cell.live else data.draw(st.sampled_from(PRIMITIVES))
        for _, cell in genotype.cells
        for e in cell.edges
    ]
    with torch.no_grad():
        logits = SUPERNET(images(), genotype)
        assert torch.equal(SUPERNET(images(), genotype.with_primitives(names)), logits)


@settings(max_examples=15)
@given(genotypes(PRIMITIVES, nodes=(4,)))
def test_order_of_concat_and_of_edges_changes_nothing(genotype: Genotype) -> None:
    turned = Genotype(*(Cell(c.edges[::-1], c.concat[::-1]) for _, c in genotype.cells))
    with torch.no_grad():
        a, b = SUPERNET(images(), genotype), SUPERNET(images(), turned)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_network_of_nulls_gives_its_bias_and_holds_no_operation() -> None:
    genotype = random_genotypes(1)[0]
    nulls = genotype.with_primitives(["null"] * 16)
    network = standalone(nulls)
    with torch.no_grad():
        network.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        expected = network.classifier.bias.expand(5, 3)
        assert torch.equal(network(images()), expected)
    assert not [n for n, _ in network.named_parameters() if ".edges." in n]
    network(images()).sum().backward()  # trains all the same


def test_null_means_the_edge_is_not_there() -> None:
    with_null = chain("conv_3x3", "null", "sep_conv_3x3")
    without = Cell(tuple(e for e in with_null.edges if e.primitive != "null"), with_null.concat)
    with torch.no_grad():
        a = SUPERNET(images(), Genotype(with_null, with_null))
        assert torch.equal(a, SUPERNET(images(), Genotype(without, without)))


def test_repeated_edges_share_weights_in_a_supernet_but_not_in_a_standalone_network() -> None:
    once = Cell((Edge(0, 2, "conv_3x3"), Edge(1, 2, "skip_connect")), (2,))
    twice = Cell((*once.edges, Edge(0, 2, "conv_3x3")), (2,))
    one, two = Genotype(once, once), Genotype(twice, twice)
    extra = parameter_count(standalone(two).parameters())
    extra -= parameter_count(standalone(one).parameters())
    assert extra == sum(9 * p.channels**2 + 2 * p.channels for p in MACRO.positions())
    assert edge_keys(twice.edges) == ["0_2_conv_3x3", "1_2_skip_connect", "0_2_conv_3x3_2"]
    network = standalone(two)
    before = network(images())
    with torch.no_grad():
        network.cells[0].edges["0_2_conv_3x3_2"].bn.bias.add_(1)  # type: ignore[index,union-attr]
    assert not torch.equal(network(images()), before)
    # 2 conv(x) + x, in the supernet: the oracle computes it term by term.
    four = Genotype(
        *(Cell((*twice.edges, *(Edge(0, t, "null") for t in (3, 4, 5))), (2, 3, 4, 5)),) * 2
    )
    agrees_with_the_oracle(SUPERNET, four, images())


def test_logits_do_not_depend_on_the_memory_format() -> None:
    genotype = random_genotypes(1)[0]
    x = images()
    with torch.no_grad():
        a = SUPERNET(x.contiguous(), genotype)
        b = SUPERNET(x.to(memory_format=torch.channels_last), genotype)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_standalone_evaluates_each_image_on_its_own() -> None:
    network = standalone(ZOO["DARTS"])
    for seed in range(3):
        network(images(seed=seed))
    network.eval()
    x = images(4, seed=9)
    with torch.no_grad():
        whole = network(x)
        for i in range(4):
            torch.testing.assert_close(network(x[i : i + 1]), whole[i : i + 1])
        assert torch.equal(network(x), whole)


def test_a_supernet_does_not_change_by_being_used() -> None:
    before = copy.deepcopy(SUPERNET.state_dict())
    with torch.no_grad():
        SUPERNET(images(), random_genotypes(1)[0])
    after = SUPERNET.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ZOO)
def test_every_published_genotype_builds_and_runs(name: str) -> None:
    network = standalone(ZOO[name])
    logits = network(images(2))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert bool(torch.isfinite(logits).all())


@settings(max_examples=15)
@given(any_genotypes())
def test_any_genotype_runs_forward_and_backward(genotype: Genotype) -> None:
    network = standalone(genotype)
    logits = network(images(2))
    logits.sum().backward()
    assert bool(torch.isfinite(logits).all())
    used = [p for p in network.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(p.grad).all()) for p in used)


# --- supernet and standalone network agree -----------------------------------------------------


@pytest.mark.parametrize("name", COPIED)
def test_standalone_with_copied_weights_gives_the_supernets_logits(name: str) -> None:
    genotype = ZOO[name]
    whole = supernet(max(cell.nodes for _, cell in genotype.cells))
    own = standalone(genotype, shared=True)
    own.copy_from(whole)
    x = images(6)
    for training in (True, False):
        whole.train(training)
        own.train(training)
        with torch.no_grad():
            torch.testing.assert_close(own(x), whole(x, genotype), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own(x), whole(x, genotype), rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(genotypes(PRIMITIVES, nodes=(2, 3, 5), degrees=(1, 2, 3)))
def test_any_genotype_copied_from_a_larger_supernet_gives_its_logits(genotype: Genotype) -> None:
    whole, own = supernet(5), standalone(genotype, shared=True)
    own.copy_from(whole)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(own(x), whole(x, genotype), rtol=1e-10, atol=1e-10)


def test_copied_weights_are_copies() -> None:
    whole, own = supernet(), standalone(ZOO["DARTS"], shared=True)
    own.copy_from(whole)
    before = copy.deepcopy(whole.state_dict())
    with torch.no_grad():
        for p in own.parameters():
            p.zero_()
    assert all(torch.equal(before[n], v) for n, v in whole.state_dict().items())


def test_a_supernet_of_five_nodes_runs_cells_of_four() -> None:
    five = supernet(5)
    logits = {n: five(images(), ZOO[n]) for n in ("DARTS", "ENAS", "VGG")}
    assert all(v.shape == (5, 3) for v in logits.values())
    assert not torch.equal(logits["DARTS"], logits["VGG"])


# --- weights and the global random state -------------------------------------------------------


def test_weights_follow_the_generator_and_nothing_else() -> None:
    def weights(**options: object) -> dict[str, Tensor]:
        return CellNetwork(MACRO, genotype=ZOO["DARTS"], **options).state_dict()  # type: ignore[arg-type]

    state = torch.random.get_rng_state()
    a, b, c = (weights(generator=generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["stem.weight"], c["stem.weight"])
    first = weights()
    torch.manual_seed(1)
    assert all(torch.equal(first[n], v) for n, v in weights().items())
    torch.random.set_rng_state(state)
    CellNetwork(MACRO, genotype=ZOO["VGG"])
    CellNetwork(MACRO, genotype=ZOO["VGG"], device="meta")
    supernet()(images().requires_grad_(), ZOO["DARTS"]).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_are_drawn_like_pytorchs_layers() -> None:
    network = CellNetwork(MacroConfig(16, 3), genotype=ZOO["DARTS"], generator=generator())
    for name, p in network.named_parameters():
        if p.ndim > 1:
            bound = p[0].numel() ** -0.5
            assert p.abs().max() <= bound
            if p.numel() > 200:
                assert p.abs().max() > 0.9 * bound
                assert abs(float(p.detach().mean())) < 0.2 * bound
        elif name.endswith("bn.weight"):
            assert bool((p == 1).all())
        elif name.endswith("bn.bias"):
            assert bool((p == 0).all())


def test_meta_networks_hold_no_memory() -> None:
    network = CellNetwork(MACRO, genotype=ZOO["DARTS"], device="meta")
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert parameter_count(network.parameters()) == parameter_count(
        standalone(ZOO["DARTS"]).parameters()
    )


def test_a_supernet_holds_every_primitive_on_every_possible_edge() -> None:
    whole = supernet(3)
    keys = {
        f"{s}_{t}_{p}"
        for t in range(INPUTS, INPUTS + 3)
        for s in range(t)
        for p in PRIMITIVES
        if p != "null"
    }
    for cell, place in zip(whole.cells, MACRO.positions(), strict=True):
        stride_one_skips = {
            k for k in keys
            if k.endswith("skip_connect") and not (place.kind == "reduce" and k[0] in "01")
        }  # fmt: skip
        assert set(cell.edges) == keys - stride_one_skips  # type: ignore[arg-type]


# --- bad input ---------------------------------------------------------------------------------


def test_a_supernet_must_be_told_what_to_run() -> None:
    with pytest.raises(NatlibError, match="needs a genotype"):
        SUPERNET(images())


def test_more_nodes_than_the_supernet_has() -> None:
    for call in (
        lambda: SUPERNET(images(), ZOO["ENAS"]),
        lambda: standalone(ZOO["ENAS"], shared=True).copy_from(SUPERNET),
    ):
        with pytest.raises(NatlibError, match="normal cell has 5 nodes; this supernet has 4"):
            call()


@pytest.mark.parametrize("name", [p for p in ALL_PRIMITIVES if p not in ("null", "skip_connect")])
def test_primitives_the_supernet_lacks(name: str) -> None:
    others = [p for p in PRIMITIVES if p != name]
    network = CellNetwork(MACRO, nodes=1, primitives=others).double()
    genotype = Genotype(chain("null", "null"), chain("null", name))
    with pytest.raises(NatlibError, match=f"1_2_{name}"):
        network(images(), genotype)
    if "pool" not in name:
        with pytest.raises(NatlibError, match=f"1_2_{name}"):
            standalone(genotype, shared=True).copy_from(network)


def test_a_skip_that_reduces_needs_weights() -> None:
    network = CellNetwork(MACRO, nodes=1, primitives=["conv_1x1"]).double()
    with pytest.raises(NatlibError, match="0_2_skip_connect"):
        network(
            images(), Genotype(chain("conv_1x1", "conv_1x1"), chain("skip_connect", "conv_1x1"))
        )


def test_a_standalone_network_runs_its_own_genotype_only() -> None:
    with pytest.raises(NatlibError, match="no weights for edge"):
        standalone(ZOO["DARTS"])(images(), ZOO["NAT_R1"])


def test_arguments_that_contradict_each_other() -> None:
    for options in (
        {},
        {"genotype": ZOO["DARTS"], "nodes": 4, "primitives": PRIMITIVES},
        {"nodes": 4},
        {"primitives": PRIMITIVES},
        {"nodes": 0, "primitives": PRIMITIVES},
        {"nodes": 4, "primitives": ()},
    ):
        with pytest.raises(NatlibError, match="supernet"):
            CellNetwork(MACRO, **options)  # type: ignore[arg-type]
    with pytest.raises(NatlibError, match="sep_conv_9x9"):
        CellNetwork(MACRO, nodes=1, primitives=["sep_conv_9x9"])


def test_copy_from_needs_a_supernet_of_the_same_macro_and_shared_norms() -> None:
    with pytest.raises(NatlibError, match="shared batch norms"):
        standalone(ZOO["DARTS"]).copy_from(SUPERNET)
    with pytest.raises(NatlibError, match="takes a supernet"):
        standalone(ZOO["DARTS"], shared=True).copy_from(standalone(ZOO["DARTS"], shared=True))
    with pytest.raises(NatlibError, match="takes a supernet"):
        supernet().copy_from(SUPERNET)
    other = MacroConfig(channels=4, cells=6, classes=3, image_size=8)
    with pytest.raises(NatlibError, match=r"cells=6.*cells=5"):
        standalone(ZOO["DARTS"], other, shared=True).copy_from(SUPERNET)


# --- what genotypes share ----------------------------------------------------------------------


def rewritings(genotype: Genotype, count: int, seed: int) -> list[Genotype]:
    """The genotype, rewritings of it, and repetitions of both."""
    policy = random_policy("natpp", SpaceConfig())
    drawn = policy.sample([genotype] * count, generator(seed)).genotypes
    return [genotype, *drawn, genotype, drawn[0]]


@settings(max_examples=25)
@given(
    genotypes(PRIMITIVES, nodes=(3,), degrees=(1, 2, 3)), st.integers(0, 99),
    st.sampled_from([0, 2000, 20000, 10**9]),
)  # fmt: skip
def test_a_memo_changes_no_logit(genotype: Genotype, seed: int, limit: int) -> None:
    network, x = supernet(3), images(3).contiguous(memory_format=torch.channels_last)
    memo = Memo(limit)
    with torch.no_grad():
        for g in rewritings(genotype, 4, seed):
            assert torch.equal(network(x, g, memo), network(x, g))
            assert memo.held <= limit
            held = [t for values in memo._values for t in values.values()]
            assert memo.held == sum(t.numel() * t.element_size() for t in held)


def test_what_was_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, calls = supernet(4), images(2), []
    plain = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(args) or plain(*args))
    darts = ZOO["DARTS"]
    names = list(darts.primitives)
    names[len(darts.normal.edges)] = "null"  # of the reduction cell
    other = darts.with_primitives(names)
    with torch.no_grad():
        network(x, other)
        alone = len(calls)
        memo = Memo()
        network(x, darts, memo)
        first = len(calls) - alone
        network(x, darts, memo)
        assert len(calls) == alone + first
        network(x, other, memo)
    # Stem, the cell before the first reduction, and that cell's other edges are there already.
    again = len(calls) - alone - first
    assert 0 < again < 0.8 * alone


# --- ImageNet, auxiliary head, dropped paths -----------------------------------------------------

IMAGENET = ImageNetMacro(channels=4, cells=5, classes=3, image_size=32)


def test_an_imagenet_network_starts_behind_its_stem_as_one_without_would() -> None:
    """Cells, input layers and classifier are those of the network for small images."""
    network = standalone(ZOO["DARTS"], IMAGENET).eval()
    x = images(3, IMAGENET)  # type: ignore[arg-type]
    first, second = network.stems
    at_quarter = first(x)
    at_eighth = second(at_quarter)
    assert at_quarter.shape == (3, 4, 8, 8) and at_eighth.shape == (3, 4, 4, 4)
    relus = (at_quarter.relu(), at_eighth.relu())
    for module in network.cells:
        cell = getattr(ZOO["DARTS"], module.place.kind)  # type: ignore[union-attr]
        memo = Memo()
        inputs = tuple(memo.take(partial(torch.clone, x), "in", n) for n, x in enumerate(relus))
        values = module(inputs, (None, None), cell, memo)
        out = torch.cat([values[n].tensor for n in cell.concat], 1)
        relus = (relus[1], out.relu())
    torch.testing.assert_close(network(x), network.classifier(out.mean((2, 3))))


def test_an_imagenet_supernet_runs_and_hands_its_weights_on() -> None:
    shared = CellNetwork(IMAGENET, nodes=4, primitives=PRIMITIVES, generator=generator()).double()
    alone = standalone(ZOO["VGG"], IMAGENET, shared=True)
    alone.copy_from(shared)
    x = images(3, IMAGENET)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(alone(x), shared(x, ZOO["VGG"]))


@pytest.mark.parametrize("macro", [MacroConfig(4, 5, 3), ImageNetMacro(4, 5, 3)])
@pytest.mark.parametrize("name", ["DARTS", "VGG", "ENAS"])
def test_the_auxiliary_head_costs_what_the_formula_says(
    macro: MacroConfig | ImageNetMacro, name: str
) -> None:
    with_head = CellNetwork(macro, genotype=ZOO[name], auxiliary=True, device="meta")
    without = CellNetwork(macro, genotype=ZOO[name], device="meta")
    extra = parameter_count(with_head.parameters()) - parameter_count(without.parameters())
    assert extra == auxiliary_cost(ZOO[name], macro).params
    assert network_cost(ZOO[name], macro).params == parameter_count(without.parameters())


def test_the_auxiliary_head_reads_the_last_reduction_and_leaves_the_logits_alone() -> None:
    macro = MacroConfig(4, 5, classes=3)
    network = standalone(ZOO["DARTS"], macro, auxiliary=True)
    without = standalone(ZOO["DARTS"], macro)
    x = images(4, macro)
    logits, second = network.with_auxiliary(x)
    assert second.shape == logits.shape == (4, 3)
    torch.testing.assert_close(logits, without(x))
    gradients = torch.autograd.grad(second.square().sum(), list(network.parameters()),
                                    allow_unused=True)  # fmt: skip
    reached = {n for (n, _), g in zip(network.named_parameters(), gradients, strict=True)
               if g is not None}  # fmt: skip
    assert {n.split(".")[1] for n in reached if n.startswith("cells.")} == {"0", "1", "2", "3"}
    assert not [n for n in reached if n.startswith("classifier")]


def test_networks_that_cannot_have_an_auxiliary_head_say_so() -> None:
    with pytest.raises(NatlibError, match="standalone"):
        CellNetwork(MACRO, nodes=4, primitives=PRIMITIVES, auxiliary=True)
    with pytest.raises(NatlibError, match="image_size = 8"):
        standalone(ZOO["DARTS"], MACRO, auxiliary=True)
    with pytest.raises(NatlibError, match="without an auxiliary head"):
        standalone(ZOO["DARTS"]).with_auxiliary(images())


def test_dropped_paths_are_those_the_generator_draws_and_only_in_training() -> None:
    network = standalone(ZOO["DARTS"])
    plain = network(images())
    network.drop_path = 0.5
    with pytest.raises(NatlibError, match=r"drop_path = 0\.5 needs a generator"):
        network(images())
    with pytest.raises(NatlibError, match=r"drop_path = 0\.5 leaves nothing for a memo"):
        network(images(), memo=Memo(), generator=generator())
    one, same, other = (network(images(), generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other) and not torch.equal(one, plain)
    network.eval()
    evaluated = network(images())
    network.drop_path = 0.0
    assert torch.equal(network(images()), evaluated)


def test_a_dropped_path_is_left_out_for_the_whole_image_and_the_others_scaled_up() -> None:
    cell = Cell((Edge(0, 2, "null"), Edge(1, 2, "conv_1x1")), (2,))
    macro = MacroConfig(4, 1, classes=3, image_size=8)
    network = standalone(Genotype(cell, cell), macro)
    bias = network.classifier.bias.detach()
    x = images(40, macro)
    with torch.no_grad():
        plain = network(x)
        network.drop_path = 0.25
        logits = network(x, generator=generator())
    kept = (torch.rand(40, 1, 1, 1, generator=generator()) < 0.75).flatten()
    assert 0 < kept.sum() < 40
    torch.testing.assert_close(logits[~kept], bias.expand(int((~kept).sum()), 3))
    torch.testing.assert_close(logits[kept] - bias, (plain[kept] - bias) / 0.75)
